"""Lines that the processes of a server write, as records: who wrote it, how grave it is, and about which request.

Lines that belong together become one record: a table of Triton's, a traceback of Python's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone

LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "error"}
# tritonserver: I1126 17:42:28.016530 28900 http_server.cc:4713] "Started HTTPService"; a stub's place is a Python file.
TRITON = re.compile(r"(?P<level>[IWEF])\d{4} [\d:.]+ \d+ (?P<place>\S+:\d+)\] (?P<message>.*)")
# The engine, as its logging is set up: 2026-11-26 17:42:28,016 gptj_triton INFO model loaded.
PYTHON = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \S+ (?P<level>[A-Z]+) (?P<message>.*)")
REQUEST = re.compile(r"\[request id: (?P<id>[^]]*)\] ")
UNKNOWN_REQUEST = "<id_unknown>"  # as Triton says it
MODEL = re.compile(r"(?P<model>[\w.+-]+): ")
TRACEBACK = "Traceback (most recent call last):"
BETWEEN_TRACEBACKS = (TRACEBACK, "During handling of the above", "The above exception was")
CONTINUED = (" ", "\t", "|", "+-")  # how lines begin that are part of the record before them
OTHER = "other"  # the source of lines that do not say who wrote them


@dataclass
class Record:
    """One entry of a log. `source` is tritonserver, engine, serve.py, the name of a stub's model, or `other`."""

    level: str
    source: str
    message: str
    request_id: str = ""
    time: datetime = field(default_factory=lambda: datetime.now(timezone.utc), compare=False)  # when it came
    in_traceback: bool = field(default=False, compare=False)  # more of it must follow

    def as_json(self) -> str:
        """One line; the time as in RFC 3339, in UTC."""
        time = self.time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"time": time, "level": self.level, "source": self.source, "message": self.message.strip("\n")}
        return json.dumps(entry | ({"request_id": self.request_id} if self.request_id else {}))


class RecordReader:
    """Makes records of lines. The last one may still grow, until `flush`."""

    def __init__(self) -> None:
        self._last: Record | None = None

    @property
    def waits(self) -> bool:
        """Whether there is a record that may still grow."""
        return self._last is not None

    def feed(self, line: str) -> Iterator[Record]:
        """The records that a line, without its end, completes."""
        record = read_header(line)
        if record is not None and self._last is not None and self._last.in_traceback:
            yield record  # another process's, in between
        elif record is not None:
            yield from self.flush()
            self._last = record
        elif self._last is not None and self._continues(line):
            self._last.message += f"\n{line}"
            self._last.in_traceback = _is_unfinished(line, self._last.in_traceback)
        elif line.strip():
            yield from self.flush()
            is_traceback = line.startswith(TRACEBACK)
            self._last = Record("error" if is_traceback else "info", OTHER, line, in_traceback=is_traceback)

    def flush(self) -> Iterator[Record]:
        """The record that is complete because nothing more came."""
        if self._last is not None:
            yield self._last
        self._last = None

    def _continues(self, line: str) -> bool:
        """Whether a line without a header is part of the last record."""
        assert self._last is not None
        if self._last.in_traceback or not line.strip() or line.startswith(CONTINUED):
            return True
        # A traceback belongs to what the engine's logging just said, or to another traceback.
        is_python = self._last.source == "engine" or TRACEBACK in self._last.message
        return is_python and line.startswith(BETWEEN_TRACEBACKS)


def read_header(line: str) -> Record | None:
    """The record that begins with a line; None for one that does not say who wrote it."""
    if match := TRITON.match(line):
        message = _unquoted(match["message"])
        request = REQUEST.match(message)
        if request is not None:
            message = message[request.end() :]
        source = "tritonserver"
        if match["place"].rpartition(":")[0].endswith(".py"):
            model = MODEL.match(message)
            source, message = (model["model"], message[model.end() :]) if model else ("stub", message)
        request_id = request["id"] if request is not None and request["id"] != UNKNOWN_REQUEST else ""
        return Record(LEVELS[match["level"]], source, message, request_id)
    if match := PYTHON.match(line):
        return Record(match["level"].lower(), "engine", match["message"])
    return None


def _unquoted(message: str) -> str:
    """A message of Triton's without its quotation marks and escapes, where it has them."""
    try:
        return str(json.loads(message, strict=False)) if message.startswith('"') else message
    except ValueError:
        return message


def _is_unfinished(line: str, in_traceback: bool) -> bool:
    """Whether more of a traceback must follow after a line: it ends with the line that names the exception."""
    if line.startswith(BETWEEN_TRACEBACKS):
        return True
    return in_traceback and (not line.strip() or line.startswith(CONTINUED))
