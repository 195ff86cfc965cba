"""Watching other processes end. Linux only; knows nothing of what they do."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


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


def process_has_ended(pid: int) -> bool:
    """True if there is no process `pid` any more."""
    pidfd = open_pidfd(pid)
    if pidfd is None:
        return True
    os.close(pidfd)
    return False


def has_ended(pidfd: int) -> bool:
    """True if the process has ended."""
    return bool(_poll(pidfd).poll(0))


def when_ended(pid: int, act: Callable[[], None]) -> threading.Thread:
    """Call `act` on a thread of its own, which is returned, when process `pid` has ended."""
    pidfd = open_pidfd(pid)

    def wait() -> None:
        if pidfd is not None:
            _poll(pidfd).poll()
            os.close(pidfd)
        act()

    thread = threading.Thread(target=wait, name=f"watch-{pid}", daemon=True)
    thread.start()
    return thread


def _poll(pidfd: int) -> select.poll:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return poll
