"""The one exception that the launcher shows to its user."""

from __future__ import annotations


class ServeError(Exception):
    """The server cannot start or cannot go on; the message is one line and names the cause."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
