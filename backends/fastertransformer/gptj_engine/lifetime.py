"""Watching other processes end, and cleaning up after a Triton server that was killed. Linux only; knows nothing of
requests.

A killed tritonserver leaves its Python stubs waiting on a futex for ever, with their shared memory. A stub's arguments
name its shared-memory region (the second) and the server's process id (the fifth): python_backend,
src/stub_launcher.cc.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
STUB = "triton_python_backend_stub"


def open_pidfd(pid: int) -> int | None:
    """A file descriptor that turns readable when process `pid` ends; None if it has ended already (a zombie has)."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if has_ended(pidfd):
        os.close(pidfd)
        return None
    return pidfd


def has_ended(pidfd: int) -> bool:
    """True if the process has ended."""
    return bool(_poll(pidfd).poll(0))


def when_ended(pid: int, act: Callable[[], None]) -> None:
    """Call `act` on a thread of its own when process `pid` has ended, whatever this process does meanwhile."""
    pidfd = open_pidfd(pid)

    def wait() -> None:
        if pidfd is not None:
            _poll(pidfd).poll()
            os.close(pidfd)
        act()

    threading.Thread(target=wait, name=f"watch-{pid}", daemon=True).start()


def remove_if_empty(directory: Path) -> None:
    """Remove the directory of an engine's sockets, and its parent, unless somebody still has a file there."""
    with contextlib.suppress(OSError):
        directory.rmdir()
        directory.parent.rmdir()


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


def _poll(pidfd: int) -> select.poll:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return poll
