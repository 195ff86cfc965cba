"""nginx and HAProxy before servers on this machine, with the files of deploy/proxy as they are and what an operator
sets: addresses, keys, a certificate. Knows nothing of requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.bench.debian_programs import debian_program
from gptj_triton.bench.holding.members import Member, low_ports
from gptj_triton.bench.local_server import Addresses, ServerFailedError
from gptj_triton.project import PROJECT

DEPLOY = PROJECT / "deploy" / "proxy"
PROXIES = ("nginx", "haproxy")
SERVERS = 3  # for which the files have lines
STARTED_SECONDS = 30.0


@dataclass(frozen=True)
class Proxy:
    """One that runs. Each of `keys` is a client's."""

    name: str
    addresses: Addresses
    tls: ssl.SSLContext
    keys: Sequence[str]


def make_certificate(folder: Path) -> Path:
    """For 127.0.0.1, signed by itself, with its private key in one file."""
    file, subject = folder / "tls.pem", ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    made = subprocess.run(
        ["openssl", "req", "-x509", *kind, *subject, "-keyout", file, "-out", file.with_suffix(".crt")],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise ServerFailedError(f"openssl: {made.stderr.strip()}")
    file.write_text(file.read_text() + file.with_suffix(".crt").read_text())
    return file


def haproxy_settings(
    members: Sequence[Member], port: int, folder: Path, keys: Mapping[str, str], server_key: str
) -> dict[str, str]:
    """Variables that haproxy.cfg reads. `keys` are those of clients by name."""
    map_file = folder / "haproxy-keys.map"
    map_file.write_text("".join(f"{key} {name}\n" for name, key in keys.items()))
    nobody = f"127.0.0.1:{low_ports(1)[0]}"
    found = {
        "GPTJ_LISTEN": f"127.0.0.1:{port}",
        "GPTJ_LISTEN_INSIDE": f"127.0.0.1:{port + 1}",
        "GPTJ_CERTIFICATE": str(folder / "tls.pem"),
        "GPTJ_KEYS": str(map_file),
        "GPTJ_SERVER_KEY": server_key,
        "GPTJ_HOPS": f"gptj-fleet-{os.getpid()}-",
    }
    for number in range(1, SERVERS + 1):
        member = members[number - 1] if number <= len(members) else None
        found[f"GPTJ_SERVER_{number}"] = member.addresses.http if member else nobody
        found[f"GPTJ_METRICS_{number}"] = member.metrics if member else nobody
    return found


@contextlib.asynccontextmanager
async def running_proxy(
    name: str, members: Sequence[Member], clients: int, server_key: str, folder: Path
) -> AsyncIterator[Proxy]:
    """Starts it with its files in `folder`, and stops it at the end. Raises ServerFailedError."""
    folder.mkdir()
    certificate = make_certificate(folder)
    keys = {f"client{number}": f"key-of-client-{number}" for number in range(clients)}
    port = low_ports(2)[0]
    program = debian_program(name)
    settings = haproxy_settings(members, port, folder, keys, server_key)
    command = [str(program.path), "-db", "-f", str(DEPLOY / "haproxy.cfg")]
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, env={**program.environment, **settings}, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + STARTED_SECONDS
        while not await listens(port):
            if process.returncode is not None or time.monotonic() > deadline:
                raise ServerFailedError(f"{name} does not start: {(folder / 'log').read_text().strip()[-500:]}")
            await asyncio.sleep(0.05)
        tls = ssl.create_default_context(cafile=certificate.with_suffix(".crt"))
        yield Proxy(name, Addresses(f"127.0.0.1:{port}", ""), tls, list(keys.values()))
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
