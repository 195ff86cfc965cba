"""The processes of a server, by what they do, and what each holds: memory, threads, open files; and what a server holds
in the file system. Knows the names of Triton's processes and of the launcher's directories; sends no requests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from gptj_triton.bench.machine import resident_mib, tree
from gptj_triton.triton.stubs import SHARED_MEMORY, STUB

LAUNCHER, TRITON, ENGINE = "launcher", "tritonserver", "engine"
ENGINE_MODULE = "gptj_triton.triton.engine_process"


def processes_by_role(pid: int) -> dict[str, psutil.Process]:
    """Those of the launcher `pid` that live: launcher, tritonserver, engine, and each stub by its model's name."""
    found: dict[str, psutil.Process] = {}
    with contextlib.suppress(psutil.Error):
        for process in tree(pid):
            with contextlib.suppress(psutil.Error, IndexError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                arguments = process.cmdline()
                if process.pid == pid:
                    found[LAUNCHER] = process
                elif Path(arguments[0]).name == TRITON:
                    found[TRITON] = process
                elif Path(arguments[0]).name == STUB:
                    found[f"stub {Path(arguments[1]).parts[-3]}"] = process
                elif ENGINE_MODULE in arguments:
                    found.setdefault(ENGINE, process)
    return found


def memory_kib(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """Resident memory of each in KiB; a page that several share counts a part for each."""
    return {role: 1024 * resident_mib([process]) for role, process in processes.items()}


@dataclass(frozen=True)
class Holdings:
    """What a server holds at one moment: threads and open files of each process, and names of files."""

    threads: dict[str, int]
    files: dict[str, int]
    regions: frozenset[str]
    temporary: frozenset[str]

    @classmethod
    def of(cls, pid: int, temporary: Path) -> Holdings:
        """Of the launcher `pid`, which has `temporary` for itself."""
        found = processes_by_role(pid)
        return cls(
            {role: process.num_threads() for role, process in found.items()},
            {role: process.num_fds() for role, process in found.items()},
            frozenset(regions([pid])),
            frozenset(str(path.relative_to(temporary)) for path in temporary.rglob("*")),
        )

    def more_than(self, before: Holdings) -> list[str]:
        """In words, what there is now and was not before."""
        more = [
            f"{role}: {what} {old.get(role, 0)} -> {count}"
            for what, new, old in (("threads", self.threads, before.threads), ("files", self.files, before.files))
            for role, count in new.items()
            if count > old.get(role, 0)
        ]
        return [*more, *sorted(self.regions - before.regions), *sorted(self.temporary - before.temporary)]


def regions(launchers: Iterable[int]) -> list[str]:
    """Names of the shared memory that the runs of these launchers have, or left."""
    return [path.name for pid in launchers for path in SHARED_MEMORY.glob(f"gptj_{pid}_*")]
