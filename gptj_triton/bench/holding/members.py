"""Servers of a fleet: each has ports and a directory that stay, and is started again when it ends, as systemd does it.

Knows the options of serve.py and the processes of a server; nothing of proxies or requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import psutil

from gptj_triton.bench.holding.processes import processes_by_role
from gptj_triton.bench.holding.readings import counted, read_metrics
from gptj_triton.bench.local_server import SERVE, Addresses, ServerFailedError

ALL = "server"
FIRST_PORT = 20_000  # below those that the system gives to connections: another program never gets them meanwhile
# As in the unit of docs/operations.md: RestartSec (systemd's default), RestartPreventExitStatus, TimeoutStopSec
RESTART_SECONDS, BAD_OPTION, STOP_SECONDS = 0.1, 2, 60.0
READY_SECONDS = 180.0
POLL_SECONDS = 0.1


def low_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nothing listens, that no connection from here is given."""
    found: list[int] = []
    for port in range(FIRST_PORT, 32_768):
        if len(found) == count:
            return found
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    raise ServerFailedError(f"fewer than {count} free ports from {FIRST_PORT} on")


class Member:
    """One server. Its processes come and go; `name`, `addresses` and `folder` stay."""

    def __init__(self, name: str, ports: Sequence[int], folder: Path, log: Path, arguments: Sequence[str]) -> None:
        http, grpc, metrics = ports
        self.name, self.metrics = name, f"127.0.0.1:{metrics}"
        self.addresses = Addresses(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")
        own = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        self._command = [sys.executable, str(SERVE), *own, *arguments]
        # One thread each: with more, the engines of one machine get in each other's way.
        self._environment = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": str(folder)}
        self._log = log
        log.unlink(missing_ok=True)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def keep(self) -> None:
        """Starts it again whenever it ends."""
        while True:
            ended = self._process
            assert ended is not None
            await ended.wait()
            await asyncio.sleep(RESTART_SECONDS)
            if ended.returncode == BAD_OPTION:
                return
            if ended is self._process and not self._stopping:
                await self.start()

    async def stop(self) -> int:
        """Its exit status after SIGTERM."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except asyncio.TimeoutError:
            self.kill(ALL)
            return await self._process.wait()

    def kill(self, role: str) -> None:
        """SIGKILL to one of its processes, or to all of them."""
        assert self._process is not None
        found = processes_by_role(self._process.pid)
        for process in found.values() if role == ALL else [found[role]] if role in found else []:
            with contextlib.suppress(psutil.Error):
                process.kill()

    async def stop_and_start(self) -> int:
        """As `systemctl restart` does it. Returns the exit status of the one that ended."""
        self._stopping = True
        try:
            status = await self.stop()
            await self.start()
            return status
        finally:
            self._stopping = False

    async def is_ready(self) -> bool:
        """Whether it says that it would serve a request."""
        limit = aiohttp.ClientTimeout(total=2.0)
        with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
            async with (
                aiohttp.ClientSession(timeout=limit) as session,
                session.get(f"http://{self.addresses.http}/v2/health/ready") as response,
            ):
                return response.status == 200
        return False

    async def becomes_ready(self, within: float = READY_SECONDS) -> None:
        """Waits for that. Raises ServerFailedError."""
        started = time.monotonic()
        while not await self.is_ready():
            assert self._process is not None
            if self._process.returncode == BAD_OPTION or time.monotonic() > started + within:
                words = self._log.read_text(errors="replace").splitlines() or ["none"]
                seconds = time.monotonic() - started
                raise ServerFailedError(f"{self.name} is not ready after {seconds:.0f} s; its last words: {words[-1]}")
            await asyncio.sleep(POLL_SECONDS)

    async def takes_requests(self, within: float) -> float | None:
        """Waits until it has answered one more request, and returns the seconds that it took; None where none comes."""
        started, before = time.monotonic(), await self._answered()
        while time.monotonic() < started + within:
            if (now := await self._answered()) > before:
                return time.monotonic() - started
            before = min(before, now)  # a new tritonserver counts from 0
            await asyncio.sleep(POLL_SECONDS)
        return None

    async def _answered(self) -> float:
        """Requests that its tritonserver has answered since it was started; 0 where there is none."""
        with contextlib.suppress(OSError):
            return (await asyncio.to_thread(counted, await asyncio.to_thread(read_metrics, self.metrics)))[0]
        return 0.0


@contextlib.asynccontextmanager
async def kept(members: Sequence[Member]) -> AsyncIterator[None]:
    """Starts servers, and each again when it ends, until the block does. They are not ready when that begins."""
    keeping: list[asyncio.Task[None]] = []
    try:
        for member in members:
            await member.start()
            keeping.append(asyncio.create_task(member.keep()))
        yield
    finally:
        for task in keeping:
            task.cancel()
        await asyncio.gather(*(member.stop() for member in members[: len(keeping)]))
