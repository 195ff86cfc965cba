"""Sees that a stub died or stands still, which Triton 2.51 does not mend: what was in flight there is never answered.

Each stub notes itself in a directory (installation.py). As long as tritonserver has not collected a stub's status it
keeps its process id, so that cannot mean another process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Triton collects at once the status of a stub whose model was unloaded in order, and after a second that of one which
# ended while its model was being loaded.
LOADED_SECONDS, OTHERS_SECONDS = 0.5, 4.0
STOPPED_SECONDS = 2.0


@dataclass
class StubWatch:
    """The stubs that note themselves in `folder`, children of the process `server`; `is_loaded` says whether requests
    for a model may be in flight."""

    folder: Path
    server: int
    is_loaded: Callable[[str], bool]
    _since: dict[tuple[str, str], float] = field(default_factory=dict)  # when a stub's state was seen first

    def failure(self) -> str | None:
        """Why requests in flight may hang now, as one line; None if they do not. A stub that has been stopped for a
        while is killed, and is a dead one the next time."""
        now = time.monotonic()
        seen = dict[tuple[str, str], float]()
        cause = None
        for name in os.listdir(self.folder):
            status = read_status(int(name))
            if status is None or status.parent != self.server:
                (self.folder / name).unlink(missing_ok=True)
                continue
            since = seen[name, status.state] = self._since.get((name, status.state), now)
            if status.state == "T" and now - since >= STOPPED_SECONDS:
                os.kill(int(name), signal.SIGKILL)
            elif status.state == "Z":
                model = self._model(name)
                if now - since >= OTHERS_SECONDS or (now - since >= LOADED_SECONDS and self.is_loaded(model)):
                    cause = f"the stub of model {model} {status.how_it_ended}"
        self._since = seen
        return cause

    def _model(self, name: str) -> str:
        """The model of a stub, which noted the path of its model.py: REPOSITORY/MODEL/VERSION/model.py."""
        return Path((self.folder / name).read_text(encoding="utf-8", errors="replace").strip()).parts[-3]


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
