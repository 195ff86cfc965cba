"""Runs a proxy in front of the servers of a fleet. Knows nothing of its files, nor of requests."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.bench.holding.members import Member, low_ports
from gptj_triton.bench.local_server import Addresses, ServerFailedError
from gptj_triton.bench.proxies import SERVERS, Behind, prepare

STARTED_SECONDS = 60.0
PORTS = 5  # that a proxy takes


@dataclass(frozen=True)
class Proxy:
    """One that runs. Each of `keys` is a client's."""

    name: str
    addresses: Addresses
    tls: ssl.SSLContext
    keys: Sequence[str]


@contextlib.asynccontextmanager
async def running_proxy(
    name: str, members: Sequence[Member], clients: int, server_key: str, folder: Path
) -> AsyncIterator[Proxy]:
    """Starts it with its files in `folder`, and stops it at the end. Raises ServerFailedError."""
    folder.mkdir()
    keys = {f"client{number}": f"key-of-client-{number}" for number in range(clients)}
    *ports, nobody = low_ports(PORTS + 1)
    servers = [Behind(member.addresses.http, member.metrics) for member in members]
    servers += [Behind(f"127.0.0.1:{nobody}", f"127.0.0.1:{nobody}")] * (SERVERS - len(servers))
    made = prepare(name, servers, ports, keys, folder, server_key=server_key)
    output = folder / "output"
    with output.open("wb") as log:
        process = await asyncio.create_subprocess_exec(*made.command, env=made.environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + STARTED_SECONDS
        while not await listens(ports[0]):
            if process.returncode is not None or time.monotonic() > deadline:
                raise ServerFailedError(f"{name} does not start: {output.read_text(errors='replace').strip()[-500:]}")
            await asyncio.sleep(0.05)
        tls = ssl.create_default_context(cafile=made.certificate)
        yield Proxy(name, Addresses(made.address, ""), tls, list(keys.values()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True
    return False
