"""Servers behind a proxy, of which one is killed again and again under load, and then all are restarted in turn.

For each proxy: how requests ended, for clients that send nothing again and for those that do, how long they waited, and
when a server that was killed took requests again. `--help` lists the options. Ends with status 1 where a request was
lost that may be sent again, an answer was wrong, or a restart cut anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_triton.api_key import http_header
from gptj_triton.bench.holding.asking import Asker
from gptj_triton.bench.holding.fleet_clients import Clients, make_questions, with_texts
from gptj_triton.bench.holding.fleet_proxy import Proxy, running_proxy
from gptj_triton.bench.holding.fleet_report import Event, Part, summary
from gptj_triton.bench.holding.members import ALL, Member, kept, low_ports
from gptj_triton.bench.holding.processes import ENGINE, TRITON
from gptj_triton.bench.local_server import ServerFailedError
from gptj_triton.bench.machine import processor
from gptj_triton.bench.proxies import PROXIES, SERVERS
from gptj_triton.bench.results import make_result, write_json
from gptj_triton.project import PROJECT

# Where the launcher alone is killed, systemd and containers kill the rest.
ROLES = (ALL, TRITON, ENGINE, "stub preprocessing")
NOTICED_SECONDS = 3.0  # a server that lost its engine says so within this time
TAKEN_SECONDS = 60.0  # from ready until the proxy must have sent it a request
PATIENCE = 120.0  # seconds after which a request counts as hanging


@dataclass
class Fleet:
    """Servers that run, the proxy in front of them, and clients."""

    members: Sequence[Member]
    proxy: Proxy
    clients: Clients

    async def under_load(self, name: str, work: Coroutine[Any, Any, list[Event]], nothing_cut: bool) -> Part:
        """What clients saw, and servers did, while `work` was done."""
        part, stopped = Part(self.proxy.name, name, nothing_cut=nothing_cut), asyncio.Event()
        asking = asyncio.create_task(self.clients.run(part.account, stopped))
        try:
            part.events += await work
        finally:
            stopped.set()
            await asking
        return part

    async def kill_at_random(self, minutes: float, every: float, seed: int) -> list[Event]:
        """Kills a whole server, or a part of one, each `every` seconds. Returns when all are back."""
        chance, roles = random.Random(seed), list[str]()
        started, back = time.monotonic(), list[asyncio.Task[Event]]()
        for number in range(max(1, round(60 * minutes / every))):
            await asyncio.sleep(max(0.0, started + every * (number + 0.5) - time.monotonic()))
            roles = roles or chance.sample(ROLES, len(ROLES))
            member, role = chance.choice(await self._members_to_kill()), roles.pop()
            member.kill(role)
            back.append(asyncio.create_task(self._back(member, role)))
        await asyncio.sleep(max(0.0, started + 60 * minutes - time.monotonic()))
        return await asyncio.gather(*back)

    async def _members_to_kill(self) -> list[Member]:
        """Those that are ready, as soon as they are two: somebody has to be left."""
        while len(ready := [member for member in self.members if await member.is_ready()]) < 2:
            await asyncio.sleep(0.5)
        return ready

    async def _back(self, member: Member, role: str) -> Event:
        struck = time.monotonic()
        while await member.is_ready() and time.monotonic() < struck + NOTICED_SECONDS:
            await asyncio.sleep(0.02)
        return await self._again(f"{role} killed", member, struck)

    async def restart_all(self) -> list[Event]:
        """One server after the other, the next when the one before takes requests again."""
        events = []
        for member in self.members:
            started = time.monotonic()
            status = await member.stop_and_start()
            events.append(await self._again("restarted", member, started, status))
        return events

    async def _again(self, what: str, member: Member, since: float, status: int | None = None) -> Event:
        """Waits until a server takes requests."""
        await member.becomes_ready()
        ready = time.monotonic()
        taken = await member.takes_requests(TAKEN_SECONDS)
        return Event(what, member.name, ready - since, None if taken is None else ready + taken - since, status)


def make_members(options: argparse.Namespace, folder: Path, key_file: Path) -> list[Member]:
    """Servers with directories of their own in `folder`."""
    ports = low_ports(3 * options.servers)
    arguments = [f"--api-key-file={key_file}", "--drain-delay=2", *options.serve_arguments]
    members = []
    for number in range(options.servers):
        name = f"server{number + 1}"
        (temporary := folder / name).mkdir()
        log = options.json.parent / f"{name}.log"
        members.append(Member(name, ports[3 * number :][:3], temporary, log, arguments))
    return members


async def run(options: argparse.Namespace, folder: Path) -> list[Part]:
    """All parts behind all proxies, with servers of their own. Raises ServerFailedError."""
    this = asyncio.current_task()
    assert this is not None
    for each in (signal.SIGINT, signal.SIGTERM):  # the servers would go on otherwise
        asyncio.get_running_loop().add_signal_handler(each, this.cancel)
    (key_file := folder / "server-key").touch(mode=0o600)
    key_file.write_text(server_key := secrets.token_hex(32))
    members, parts = make_members(options, folder, key_file), list[Part]()
    async with kept(members):
        await asyncio.gather(*(member.becomes_ready() for member in members))
        async with Asker(members[0].addresses, PATIENCE, headers=http_header(server_key)) as undisturbed:
            questions = await with_texts(make_questions(options.seed, options.longest), undisturbed)
        for name in options.proxy or PROXIES:
            async with (
                running_proxy(name, members, options.clients, server_key, folder / name) as proxy,
                contextlib.AsyncExitStack() as stack,
            ):
                askers = [await stack.enter_async_context(asker) for asker in make_askers(proxy)]
                fleet = Fleet(members, proxy, Clients(askers, questions, options.retries, options.seed))
                kills = fleet.kill_at_random(options.minutes, options.kill_every, options.seed)
                parts.append(await fleet.under_load("kills", kills, nothing_cut=False))
                parts.append(await fleet.under_load("rolling restart", fleet.restart_all(), nothing_cut=True))
    return parts


def make_askers(proxy: Proxy) -> list[Asker]:
    """One for each key, with an IP address of its own: proxies count connections by address."""
    return [
        Asker(proxy.addresses, PATIENCE, proxy.tls, f"127.0.0.{number}", http_header(key))
        for number, key in enumerate(proxy.keys, 2)
    ]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Kills servers behind a proxy under load, restarts all in turn, and accounts for all requests.",
        epilog="Options of serve.py may follow after --.",
    )
    add = parser.add_argument
    proxy_help = "of deploy/proxy; may be given again (default: one after the other)"
    add("--proxy", choices=PROXIES, action="append", help=proxy_help)
    add("--minutes", type=float, default=3.0, metavar="N", help="of kills, behind each proxy; default: %(default)g")
    add("--kill-every", type=float, default=20.0, metavar="SECONDS", help="default: %(default)g")
    add("--servers", type=int, default=SERVERS, choices=range(2, SERVERS + 1), help="default: %(default)s")
    add("--clients", type=int, default=8, metavar="N", help="at a time, 1 to 200; default: %(default)s")
    add("--retries", type=int, default=1, metavar="N", help="of a client that sends again; default: %(default)s")
    longest_help = "leave out answers and streams of more tokens; default: %(default)s"
    add("--longest", type=int, default=300, metavar="TOKENS", help=longest_help)
    add("--seed", type=int, default=1, metavar="N", help="of requests and kills; default: %(default)s")
    json_help = "the result; logs of the servers stand beside it (default: build/fleet/fleet.json)"
    add("--json", type=Path, default=PROJECT / "build" / "fleet" / "fleet.json", metavar="FILE", help=json_help)
    add("serve_arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= 600 or not 1 <= options.kill_every <= 3600:
        parser.error("--minutes must be above 0 and at most 600, --kill-every 1 to 3600")
    if not 1 <= options.clients <= 200 or not 0 <= options.retries <= 10 or options.longest < 1:
        parser.error("--clients must be 1 to 200, --retries 0 to 10, --longest 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="gptj-fleet-", dir="/tmp") as folder:
            parts = asyncio.run(run(options, Path(folder)))
    except asyncio.CancelledError:
        return 130
    except (ServerFailedError, OSError, ValueError) as error:
        print(f"fleet.py: {error}", file=sys.stderr)
        return 1
    broken = [each for part in parts for each in part.broken]
    print(*parts, summary(parts), *(f"BROKEN: {each}" for each in broken), sep="\n\n")
    facts: dict[str, Any] = {name: getattr(options, name) for name in ("minutes", "kill_every", "servers", "clients")}
    facts |= {"retries": options.retries, "seed": options.seed, "machine": processor(), "broken": broken}
    facts["events"] = [
        {"proxy": part.proxy, "part": part.name, **vars(event)} for part in parts for event in part.events
    ]
    write_json(make_result("fleet", [row for part in parts for row in part.rows], **facts), options.json)
    return 1 if broken else 0
