"""Sees that a stub died, or that a stub or tritonserver stands still. Triton 2.51 does not mend that: it never answers
what was in flight there.

Each stub notes itself in a directory (installation.py). As long as tritonserver has not collected a stub's status it
keeps its process id, so that cannot mean another process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Triton collects at once the status of a stub whose model was unloaded in order, and after a second that of one which
# ended while its model was being loaded.
LOADED_SECONDS, OTHERS_SECONDS = 0.5, 4.0
STOPPED_SECONDS = 1.5


class StubWatch:
    """The stubs that note themselves in `folder`, children of the process `server`; `is_loaded` says whether requests
    for a model may be in flight."""

    def __init__(self, folder: Path, server: int, is_loaded: Callable[[str], bool]) -> None:
        self._folder = folder
        self._server = server
        self._is_loaded = is_loaded
        self._since: dict[tuple[int, str], float] = {}  # when a process was seen first in its state

    def failure(self) -> str | None:
        """Why requests in flight hang now, as one line; None if they do not."""
        now = time.monotonic()
        since = dict[tuple[int, str], float]()
        cause = None
        for pid in [self._server, *map(int, os.listdir(self._folder))]:
            status = read_status(pid)
            if status is None or self._server not in (pid, status.parent):
                (self._folder / str(pid)).unlink(missing_ok=True)
                continue
            state = pid, status.state
            since[state] = self._since.get(state, now)
            cause = cause or self._judge(pid, status, now - since[state])
        self._since = since
        return cause

    def _judge(self, pid: int, status: Status, seconds: float) -> str | None:
        """What is wrong with a process that has been in its state for so long."""
        if status.state == "T" and seconds >= STOPPED_SECONDS:
            return f"{self._name(pid)} was stopped by a signal"
        if status.state == "Z" and pid != self._server:
            model = self._model(pid)
            if seconds >= OTHERS_SECONDS or (seconds >= LOADED_SECONDS and self._is_loaded(model)):
                return f"{self._name(pid)} {status.how_it_ended}"
        return None

    def _name(self, pid: int) -> str:
        return "tritonserver" if pid == self._server else f"the stub of model {self._model(pid)}"

    def _model(self, pid: int) -> str:
        """The model of a stub, which noted the path of its model.py: REPOSITORY/MODEL/VERSION/model.py. `unknown` where
        it could not, on a full disk for example."""
        noted = Path((self._folder / str(pid)).read_text(encoding="utf-8", errors="replace").strip()).parts
        return noted[-3] if len(noted) >= 3 else "unknown"


@dataclass(frozen=True)
class Status:
    """What the kernel says of a process: its state (a letter: proc(5)), its parent, and how it ended if it has."""

    state: str
    parent: int
    exit_code: int  # as wait(2) has it

    @property
    def how_it_ended(self) -> str:
        if os.WIFSIGNALED(self.exit_code):
            return f"was ended by {signal.Signals(os.WTERMSIG(self.exit_code)).name}"
        return f"ended with status {os.WEXITSTATUS(self.exit_code)}"


def read_status(pid: int) -> Status | None:
    """The status of a process, None if there is none."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return Status(fields[0], int(fields[1]), int(fields[-1]))
    return None
