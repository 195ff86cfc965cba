"""The log of a server on stderr: what the launcher says and what the server's processes write, as text or as JSON.

As text all lines stand as they came. As JSON each is an object of its own: time (RFC 3339, UTC), level, source, message
and, for a line about a request, request_id.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable
from typing import TextIO

from gptj_triton.serving.log_lines import Record, RecordReader

LAUNCHER = "serve.py"


class Log:
    """May be used by several threads."""

    def __init__(self) -> None:
        self.as_json = False
        self._lock = threading.Lock()
        self._reader = RecordReader()

    @property
    def waits(self) -> bool:
        """Whether `flush` would write something."""
        return self._reader.waits

    def say(self, message: str, level: str = "info") -> None:
        """Write a line of the launcher's own."""
        with self._lock:
            self._write_own(sys.stderr, message, level, f"{LAUNCHER}: {message}")

    def warn(self, message: str) -> None:
        """The same for a warning."""
        self.say(f"warning: {message}", "warning")

    def say_ready(self, url: str) -> None:
        """Write to stdout that the server can be asked at `url`."""
        with self._lock:
            self._write_own(sys.stdout, f"READY {url}", "info", f"READY {url}")

    def copy(self, line: bytes) -> None:
        """Write what a process of the server wrote."""
        with self._lock:
            if self.as_json:
                self._write_records(self._reader.feed(line.decode(errors="replace").rstrip("\n")))
            else:
                self._write(sys.stderr, line)

    def flush(self) -> None:
        """Write what waited for more lines: none came."""
        with self._lock:
            self._write_records(self._reader.flush())

    def _write_own(self, stream: TextIO, message: str, level: str, text: str) -> None:
        line = Record(level, LAUNCHER, message).as_json() if self.as_json else text
        self._write(stream, f"{line}\n".encode(errors="surrogateescape"))

    def _write_records(self, records: Iterable[Record]) -> None:
        for record in records:
            self._write(sys.stderr, f"{record.as_json()}\n".encode())

    @staticmethod
    def _write(stream: TextIO, line: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more, but the server must not wait for that
            stream.buffer.write(line)
            stream.buffer.flush()


log = Log()  # of this process
