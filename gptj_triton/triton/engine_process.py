"""The engine process as the backend starts it: process/server.py, which then also ends the stubs of a killed Triton."""

from __future__ import annotations

import resource
import sys
import time

from gptj_triton.process import server
from gptj_triton.triton.stubs import end_orphaned_stubs

STUB_GRACE_SECONDS = 0.5  # within which the stubs of a server that stopped in order end


def clean_up(server_pid: int) -> None:
    """End the stubs of a server that has ended."""
    time.sleep(STUB_GRACE_SECONDS)
    end_orphaned_stubs(lambda region, server: server == server_pid)


def allow_long_files() -> None:
    """Undo the launcher's limit for the regions of Triton's stubs: what the engine writes is its compile caches."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


if __name__ == "__main__":
    allow_long_files()
    sys.exit(server.main(clean_up=clean_up))
