"""The directory of one run of the launcher, and the removal of what killed runs left: such directories, the directories
of their engines' sockets, shared memory and stubs.

Each directory has a file `lock`, which the launcher and its tritonserver keep locked as long as they live. A directory
without such a file is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptj_triton.pidfd import process_has_ended
from gptj_triton.process.directory import server_directory
from gptj_triton.process.temporary import temporary_directory
from gptj_triton.triton.stubs import SHARED_MEMORY, end_orphaned_stubs

NAME = re.compile(r"gptj-triton-\d+_[0-9a-f]{8}")


@dataclass(frozen=True)
class RunDirectory:
    """A directory `gptj-triton-PID_HEX`. As long as any process has `lock` open, the run does not count as killed."""

    path: Path
    lock: BinaryIO

    @property
    def region_prefix(self) -> str:
        """What the names of the run's shared memory begin with."""
        return f"gptj_{self.path.name.removeprefix('gptj-triton-')}_"

    @property
    def _server_file(self) -> Path:
        return self.path / "server.pid"

    def note_server(self, pid: int) -> None:
        """Remember the run's tritonserver."""
        self._server_file.write_text(str(pid))

    def remove(self) -> None:
        """Remove all that is left of the run, whose server has ended."""
        end_orphaned_stubs(lambda region, server: region.startswith(self.region_prefix))
        for region in SHARED_MEMORY.glob(f"{self.region_prefix}*"):
            region.unlink(missing_ok=True)
        noted = self._server_file.read_text() if self._server_file.exists() else ""
        # If there is such a process, the number is another's now, and the directory may be too.
        if noted.isdecimal() and process_has_ended(int(noted)):
            shutil.rmtree(server_directory(int(noted)), ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def run_directory() -> Iterator[RunDirectory]:
    """A new directory, which is removed in the end; first what killed runs left is."""
    temporary = temporary_directory()
    for left in killed_runs(temporary):
        left.remove()
    path = temporary / f"gptj-triton-{os.getpid()}_{secrets.token_hex(4)}"
    path.mkdir(mode=0o700)
    try:
        # It gets its name when it is locked, so that no other launcher can take it for a killed one's.
        unlocked = path / "unlocked"
        with unlocked.open("xb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unlocked.rename(path / "lock")
            (path / "launcher.pid").write_text(str(os.getpid()))
            run = RunDirectory(path, lock)
            try:
                yield run
            finally:
                run.remove()
    finally:
        shutil.rmtree(path, ignore_errors=True)


def killed_runs(temporary: Path) -> Iterator[RunDirectory]:
    """This user's runs that nobody has locked; each is locked until the next is asked for."""
    for path in temporary.glob("gptj-triton-*"):
        if NAME.fullmatch(path.name) is None:
            continue
        # An error means that it is locked, or has no lock, or another launcher removes it just now.
        with contextlib.suppress(OSError), (path / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.lstat().st_uid == os.geteuid():
                yield RunDirectory(path, lock)
