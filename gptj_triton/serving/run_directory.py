"""The directory of one run of the launcher, and the removal of what killed runs left: such directories, processes,
shared memory.

Each directory has a file `lock`, which the launcher keeps locked as long as it lives. A directory without such a file
is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from gptj_triton.pidfd import process_has_ended
from gptj_triton.process.directory import RUN_VARIABLE
from gptj_triton.process.temporary import temporary_directory
from gptj_triton.triton.stubs import SHARED_MEMORY

NAME = re.compile(r"gptj-triton-\d+_[0-9a-f]{8}")
END_SECONDS = 5.0  # within which a killed process has ended


@dataclass(frozen=True)
class RunDirectory:
    """A directory `gptj-triton-PID_HEX`. Its path is in the environment of all processes of the run."""

    path: Path

    @property
    def region_prefix(self) -> str:
        """What the names of the run's shared memory begin with."""
        return f"gptj_{self.path.name.removeprefix('gptj-triton-')}_"

    @property
    def engines(self) -> Path:
        """Where each engine has its directory."""
        return self.path / "engines"

    @property
    def stubs(self) -> Path:
        """Where each stub has a file, whose name is its process id."""
        return self.path / "stubs"

    def make(self) -> None:
        """Fill the new directory."""
        self.stubs.mkdir(mode=0o700)
        self.engines.mkdir(mode=0o700)
        (self.path / "launcher.pid").write_text(str(os.getpid()))

    def engine_pids(self) -> set[int]:
        """The engines, alive or not."""
        found = set[int]()
        for path in self.engines.glob("*/engine.pid"):
            with contextlib.suppress(OSError, ValueError):  # it is being written, or removed
                found.add(int(path.read_text()))
        return found

    def forget_server(self) -> None:
        """Remove what a tritonserver left that has ended, and its stubs too; engines live on."""
        for region in SHARED_MEMORY.glob(f"{self.region_prefix}*"):
            region.unlink(missing_ok=True)
        frontends = (path for kind in ("sock", "ready") for path in self.engines.glob(f"*/*.{kind}"))
        for path in [*self.stubs.iterdir(), *frontends]:
            if path.name != "engine.sock":
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """End all processes of the run but this one, and remove all that is left of it."""
        left = [pid for pid in processes_of(self.path) if pid != os.getpid()]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        while not all(map(process_has_ended, left)) and time.monotonic() < deadline:
            time.sleep(0.01)
        for region in SHARED_MEMORY.glob(f"{self.region_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def processes_of(path: Path) -> Iterator[int]:
    """The processes of the run whose directory is `path`, whoever started them."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(RUN_VARIABLE) == str(path):
                yield process.pid


@contextlib.contextmanager
def run_directory() -> Iterator[RunDirectory]:
    """A new directory, which is removed in the end; first what killed runs left is."""
    temporary = temporary_directory()
    for left in killed_runs(temporary):
        left.remove()
    path = temporary / f"gptj-triton-{os.getpid()}_{secrets.token_hex(4)}"
    path.mkdir(mode=0o700)
    run = RunDirectory(path)
    directory = os.open(path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)  # systemd-tmpfiles removes old files, but none from a locked directory
    try:
        # It gets its name when it is locked, so that no other launcher can take it for a killed one's.
        unlocked = path / "unlocked"
        with unlocked.open("xb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unlocked.rename(path / "lock")
            run.make()
            yield run
    finally:
        run.remove()
        os.close(directory)


def killed_runs(temporary: Path) -> Iterator[RunDirectory]:
    """This user's runs that nobody has locked; each is locked until the next is asked for."""
    for path in temporary.glob("gptj-triton-*"):
        if NAME.fullmatch(path.name) is None:
            continue
        # An error means that it is locked, or has no lock, or another launcher removes it just now.
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.geteuid():  # who could have put anything in the lock's place
                continue
            with (path / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield RunDirectory(path)
