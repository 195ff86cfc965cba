"""The log of a server on stderr: what the launcher says and what the server's processes write, as text or as JSON.

As text all lines stand as they came. As JSON each is an object of its own: time (RFC 3339, UTC), level, source, message
and, for a line about a request, request_id.
"""

from __future__ import annotations

import contextlib
import select
import sys
import threading
from collections.abc import Iterable
from typing import TextIO

from gptj_triton.serving.log_lines import Record, RecordReader

LAUNCHER = "serve.py"
READER_SECONDS = 1.0  # for which the launcher waits until somebody reads: it must go on, and stop when it is told to


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
        self._write_own(sys.stderr, message, level, f"{LAUNCHER}: {message}")

    def warn(self, message: str) -> None:
        """The same for a warning."""
        self.say(f"warning: {message}", "warning")

    def say_ready(self, url: str) -> None:
        """Write to stdout that the server can be asked at `url`."""
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
        """Leaves it out where nobody reads, as in a pipeline that was stopped."""
        line = Record(level, LAUNCHER, message).as_json() if self.as_json else text
        if self._lock.acquire(timeout=READER_SECONDS):
            try:
                if is_read(stream):
                    self._write(stream, f"{line}\n".encode(errors="surrogateescape"))
            finally:
                self._lock.release()

    def _write_records(self, records: Iterable[Record]) -> None:
        for record in records:
            self._write(sys.stderr, f"{record.as_json()}\n".encode())

    @staticmethod
    def _write(stream: TextIO, line: bytes) -> None:
        # Not through its buffer, which Python flushes in the end and could not while a thread waits for a reader.
        raw = getattr(stream.buffer, "raw", stream.buffer)
        with contextlib.suppress(OSError):  # nobody listens any more, but the server must not wait for that
            while line and (written := raw.write(line)):
                line = line[written:]


def is_read(stream: TextIO) -> bool:
    """Whether a line can be written to a stream without waiting for long."""
    with contextlib.suppress(OSError, ValueError):  # it is no file
        return bool(select.select([], [stream], [], READER_SECONDS)[1])
    return True


log = Log()  # of this process
