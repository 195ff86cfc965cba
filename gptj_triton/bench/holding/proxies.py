"""DRAFT"""
from __future__ import annotations
import asyncio, contextlib, os, signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from gptj_triton.bench.holding.members import Member, low_ports
from gptj_triton.bench.local_server import Addresses

PROXIES = ("nginx", "haproxy")
ENV = Path("/tmp/w/C-env")

class Proxy:
    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.addresses = Addresses(address, "")
        self.headers: dict[str, str] = {}


@contextlib.asynccontextmanager
async def running_proxy(name: str, members: Sequence[Member], folder: Path) -> AsyncIterator[Proxy]:
    port = low_ports(1)[0]
    template = (ENV / "draft" / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[name]).read_text()
    line = {"haproxy": "    server {m.name} 127.0.0.1:{m.port}", "nginx": "server 127.0.0.1:{m.port} max_fails=1 fail_timeout=1s;"}[name]
    text = template.replace("@SERVERS@", "\n".join(line.format(m=m) for m in members)).replace("@PORT@", str(port)).replace("@FOLDER@", str(folder))
    config = folder / "proxy.conf"
    config.write_text(text)
    program = ENV / "root/usr/sbin" / name
    arguments = {"haproxy": ["-db", "-f", config], "nginx": ["-p", folder, "-c", config]}[name]
    with (folder / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(program, *arguments, stdout=log, stderr=log, env={**os.environ, "LD_LIBRARY_PATH": str(ENV / "root/usr/lib/x86_64-linux-gnu")})
    try:
        await asyncio.sleep(1.0)
        yield Proxy(name, f"127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
