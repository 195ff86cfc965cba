"""Reads server-sent events whose data is JSON, as `generate_stream` sends them. Knows nothing of what they hold.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html, of which Triton uses lines `data:` alone.
"""

from __future__ import annotations

import json
from typing import Any


class EventReader:
    """Takes the bytes of one stream as they arrive, cut anywhere; `rest` are those of a line that has not ended."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, chunk: bytes) -> list[dict[str, Any]]:
        """The events that `chunk` completes. Raises ValueError for a line that is not `data:` and JSON."""
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        return [_decoded(line) for line in lines if line.strip()]


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        if line.startswith(b"data:"):
            decoded: dict[str, Any] = json.loads(line.removeprefix(b"data:"))
            return decoded
    except ValueError:
        pass
    raise ValueError(f"not an event of JSON: {line[:200]!r}")
