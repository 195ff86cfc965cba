"""The stubs of a Triton server: the processes in which its Python backend runs `model.py`.

A killed tritonserver leaves its stubs waiting on a futex for ever, with their shared memory. A stub's arguments name
its shared-memory region (the second) and the server's process id (the fifth): python_backend, src/stub_launcher.cc.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
STUB = "triton_python_backend_stub"


def own_server_pid() -> int:
    """The process id of the server that started this stub. A stub's parent is another when the server has ended."""
    return int(psutil.Process().cmdline()[5])


def end_orphaned_stubs(server_pid: int) -> None:
    """Kill the stubs that a dead server left and remove their shared memory."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            arguments = process.cmdline()
            region, server = arguments[2], arguments[5]
            if Path(arguments[0]).name == STUB and server == str(server_pid):
                process.kill()
                (SHARED_MEMORY / region.lstrip("/")).unlink(missing_ok=True)
