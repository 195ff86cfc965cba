"""A server of one's own for a benchmark: `tools/serve.py`, or another that prints `READY`, on free ports of 127.0.0.1,
stopped at the end.

Knows the command line of serve.py and the line `READY`; nothing of models or requests.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.project import PROJECT

SERVE = PROJECT / "tools" / "serve.py"


class ServerFailedError(Exception):
    """The server did not become ready; the message ends in its last words."""


@dataclass(frozen=True)
class Addresses:
    """HOST:PORT of a server's HTTP and gRPC endpoints."""

    http: str
    grpc: str


@dataclass(frozen=True)
class LocalServer(Addresses):
    """The same, its metrics, and the process whose descendants are all of that server's processes."""

    metrics: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid


@contextlib.contextmanager
def local_server(
    arguments: Sequence[str] = (),
    ready_within: float = 120.0,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    before: Sequence[str] = (),
) -> Iterator[LocalServer]:
    """Runs serve.py with `arguments` until the block ends; the server has ended then too.

    `before` stands before the command, and must become it. The others are those of `running`. Raises ServerFailedError.
    """
    http, grpc, metrics = free_ports(3)
    ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    command = [*before, sys.executable, str(SERVE), *ports, *arguments]
    with running("serve.py", command, ready_within, environment, log) as process:
        yield LocalServer(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", process)


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    ready_within: float,
    environment: Mapping[str, str] | None = None,
    log_file: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the server `name` by its `command` until the block ends; its process.

    The server says `READY` on stdout when it is, and ends on SIGINT. `ready_within` is in seconds; `environment` is
    this process's unless given; what it says on stderr is kept in `log_file`, if given. Raises ServerFailedError."""
    with log_file.open("w+", errors="replace") if log_file else tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            bufsize=0,  # or `select` would not see a line that was read along with the one before
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the server below
        )
        try:
            if not _becomes_ready(process, ready_within):
                fate = f"was not ready within {ready_within:g} s" if process.poll() is None else "ended"
                log.seek(0)
                words = [line.strip() for line in log if line.strip()] or ["none"]
                raise ServerFailedError(f"{name} {fate}; its last words: {words[-1]}")
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.communicate()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _becomes_ready(process: subprocess.Popen[bytes], within: float) -> bool:
    assert process.stdout is not None
    deadline = time.monotonic() + within
    while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        line = process.stdout.readline()
        if line.startswith(b"READY "):
            return True
        if not line:  # it closed stdout, so it is about to end
            process.wait()
            return False
    return False
