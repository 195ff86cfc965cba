"""Reads server-sent events whose data is JSON, as `generate_stream` sends them. Knows nothing of what they hold.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html, of which Triton uses lines `data:` alone.
"""

from __future__ import annotations

import json
from typing import Any


class EventReader:
    """Takes the bytes of one stream as they arrive, cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[dict[str, Any]]:
        """The events that `chunk` completes. Raises ValueError for one that is not a line `data:` of JSON."""
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        return [_decoded(event) for event in events]


def _decoded(event: bytes) -> dict[str, Any]:
    if not event.startswith(b"data:"):
        raise ValueError(f"not an event of JSON: {event[:200]!r}")
    decoded: dict[str, Any] = json.loads(event.removeprefix(b"data:"))
    return decoded
