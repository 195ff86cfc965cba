"""The stubs of a Triton server: the processes in which its Python backend runs `model.py`.

A killed tritonserver leaves its stubs waiting on a futex for ever, with their shared memory. A stub's arguments name
its shared-memory region (the second) and the server's process id (the fifth): python_backend, src/stub_launcher.cc.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
STUB = "triton_python_backend_stub"


def own_server_pid() -> int:
    """The process id of the server that started this stub. A stub's parent is another when the server has ended."""
    return int(_stub_arguments(Path("/proc/self"))[5])


def end_orphaned_stubs(server_pid: int) -> None:
    """Kill the stubs that a dead server left and remove their shared memory."""
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with contextlib.suppress(OSError, IndexError):
            arguments = _stub_arguments(process)
            region, parent = arguments[2], arguments[5]
            if Path(arguments[0]).name == STUB and parent == str(server_pid):
                os.kill(int(process.name), signal.SIGKILL)
                (SHARED_MEMORY / region.lstrip("/")).unlink(missing_ok=True)


def _stub_arguments(process: Path) -> list[str]:
    return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
