"""What the servers of one run write: copied to the log, and remembered where it says why something failed."""

from __future__ import annotations

import os
import re
import secrets
import select
import threading
from collections.abc import Iterator

from gptj_triton.serving.log import log

# An error as tritonserver logs it ("E1122 20:58:29.018764 7996 main.cc:257] "), as it prints it, as getopt or ld.so do.
COMPLAINT = re.compile(r"(?:E\d{4} .*?\] |error: |\S*tritonserver: )(?P<cause>.+)")
LOADED = re.compile(r"successfully loaded '(?P<model>[^']+)'")
MARK_BYTES = 33
READ_BYTES = 65536
PAUSE_SECONDS = 0.2  # after which a line is not continued by the next
MARK_SECONDS = 1.0  # a stderr that takes nothing must not hold the launcher up


class Relay:
    """One pipe for all servers of a run, one after the other, and for an engine that outlives them.

    `outlet` is the file descriptor that they write to.
    """

    def __init__(self) -> None:
        inlet, self.outlet = os.pipe()
        self._marks: dict[bytes, threading.Event] = {}
        self.forget()
        self._thread = threading.Thread(target=self._copy, args=[inlet], daemon=True)
        self._thread.start()

    def forget(self) -> None:
        """A new server begins: what others said is not its fault."""
        self._complaint = ""
        self._last_line = ""
        self.loaded = set[str]()

    @property
    def last_words(self) -> str:
        """The last error that the server named, or else its last line; the server has ended."""
        self._catch_up()
        return self._complaint or self._last_line or "without a word"

    def close(self) -> None:
        """Returns when all is copied; all who write have ended."""
        self._catch_up()
        os.close(self.outlet)

    def _catch_up(self) -> None:
        """Waits until all that was written before is copied."""
        mark = secrets.token_hex(16).encode() + b"\n"
        copied = self._marks[mark] = threading.Event()
        if select.select([], [self.outlet], [], MARK_SECONDS)[1]:
            os.write(self.outlet, mark)
            copied.wait(MARK_SECONDS)

    def _copy(self, inlet: int) -> None:
        for line in read_lines(inlet):
            copied = self._marks.pop(line[-MARK_BYTES:], None)
            line = line if copied is None else line[:-MARK_BYTES]  # what a killed server could not finish
            if line:
                log.copy(line)
                self._note(line.decode(errors="replace").strip())
            if copied is not None:
                log.flush()
                copied.set()

    def _note(self, text: str) -> None:
        self._last_line = text or self._last_line
        if loaded := LOADED.search(text):
            self.loaded.add(loaded["model"])
        if complaint := COMPLAINT.match(text):
            self._complaint = complaint["cause"].strip('" ')


def read_lines(inlet: int) -> Iterator[bytes]:
    """The lines that come through a pipe, with their ends; what the log keeps back is written when there is a pause."""
    rest = b""
    while True:
        while log.waits and not select.select([inlet], [], [], PAUSE_SECONDS)[0]:
            log.flush()
        data = os.read(inlet, READ_BYTES)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
    os.close(inlet)
    if rest:
        yield rest
