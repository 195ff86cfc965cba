"""How long an engine process lives: as long as its owner, or any server that uses it, does."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from gptj_triton.pidfd import when_ended
from gptj_triton.process.directory import EngineDirectory


class Lifetime:
    """Ends this process when its owner and all its servers have ended, whatever it does then: weights may load, or a
    step may hang.

    The owner is the launcher, which starts a server again, or else the one server itself.
    """

    def __init__(
        self, owner_pid: int, server_pid: int, directory: EngineDirectory, clean_up: Callable[[int], None]
    ) -> None:
        """`server_pid` is the first server; `clean_up` is called with the process id of each when that has ended."""
        self._directory = directory
        self._clean_up = clean_up
        self._servers: dict[int, threading.Thread] = {}
        self.add_server(server_pid)
        when_ended(owner_pid, self._end)

    def add_server(self, server_pid: int) -> None:
        """A server uses the engine; it may have been added before."""
        if server_pid not in self._servers:
            self._servers[server_pid] = when_ended(server_pid, lambda: self._clean_up(server_pid))

    def _end(self) -> None:
        """After the owner ended: a launcher's last server is about to end, too, and its frontends still get answers."""
        for thread in list(self._servers.values()):
            thread.join()
        self._directory.remove_server_directory()
        os._exit(0)
