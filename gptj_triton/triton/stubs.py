"""The stubs of a Triton server: the processes in which its Python backend runs `model.py`.

A killed tritonserver leaves its stubs waiting on a futex for ever, with their shared memory. A stub's arguments name
its shared-memory region (the second) and the server's process id (the fifth): python_backend, src/stub_launcher.cc.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
STUB = "triton_python_backend_stub"


def own_server_pid() -> int:
    """The process id of the server that started this stub. A stub's parent is another when the server has ended."""
    return int(psutil.Process().cmdline()[5])


def end_orphaned_stubs(is_orphan: Callable[[str, int], bool]) -> None:
    """Kill the stubs that a dead server left and remove their shared memory.

    `is_orphan` is asked with the name of a stub's region and the process id of its server.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            arguments = process.cmdline()
            if Path(arguments[0]).name != STUB:
                continue
            region = arguments[2].lstrip("/")
            if is_orphan(region, int(arguments[5])):
                process.kill()
                (SHARED_MEMORY / region).unlink(missing_ok=True)
