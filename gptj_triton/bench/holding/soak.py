"""A mixed load for long: every request has one end, memory does not grow, and nothing is left. `--help` lists options.

Memory is that of each process once the KV cache has been written to everywhere; its slope is stated by the minute and
by the request. Prints a report, writes it as JSON, and ends with status 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptj_triton.bench.holding.asking import Asker
from gptj_triton.bench.holding.load import UNPARSED, Load, prompt, unexpected
from gptj_triton.bench.holding.outcomes import Ledger, Outcome
from gptj_triton.bench.holding.processes import Holdings, memory_kib, processes_by_role, regions
from gptj_triton.bench.holding.readings import PAGES, becomes, counted, is_idle, most, read_metrics
from gptj_triton.bench.local_server import LocalServer, ServerFailedError, local_server
from gptj_triton.bench.machine import processor
from gptj_triton.bench.results import make_result, write_json
from gptj_triton.project import PROJECT

SETTLED = 0.25  # the part of a soak after which slopes are taken: heaps have found their size
JUDGED_MINUTES = 5.0  # a shorter soak shows slopes and does not judge them
MOST_GROWTH = 100.0  # bytes a request, of any process
HEAP_NOISE_KIB = 2048.0  # by which a heap may grow and not come back
AT_REST_SECONDS = 30.0
PAGE_TOKENS, PROMPT_WORDS = 16, 400


@dataclass(frozen=True)
class Sample:
    """Memory of each process at one moment, and how many requests had been sent."""

    seconds: float
    requests: int
    kib: dict[str, float]


@dataclass(frozen=True)
class Slope:
    """How one process's memory grew: median slopes of all pairs of samples, so that a step counts little."""

    process: str
    first_kib: float
    last_kib: float
    kib_per_minute: float
    bytes_per_request: float

    def __str__(self) -> str:
        return (
            f"{self.process:<30} {self.first_kib:>9.0f} {self.last_kib:>9.0f} {self.kib_per_minute:>10.1f} "
            f"{self.bytes_per_request:>10.1f}"
        )


HEADING = f"{'process':<30} {'first KiB':>9} {'last KiB':>9} {'KiB/minute':>10} {'B/request':>10}"


@dataclass
class Soak:
    """What came of one."""

    ledger: Ledger
    slopes: list[Slope]
    faults: list[str] = field(default_factory=list)  # promises that were broken, in words


def slope_of(x: list[float], y: list[float]) -> float:
    """Theil-Sen's estimator: the median slope of all pairs; 0 where there are none."""
    earlier, later = np.triu_indices(len(x), 1)
    run = np.subtract(np.take(x, later), np.take(x, earlier))
    rise = np.subtract(np.take(y, later), np.take(y, earlier))
    return float(np.median(rise[run > 0] / run[run > 0])) if (run > 0).any() else 0.0


def slopes(samples: list[Sample]) -> list[Slope]:
    """Of every process that all samples have, after the soak has settled."""
    kept = [sample for sample in samples if sample.seconds >= SETTLED * samples[-1].seconds]
    found = []
    for role in sorted(set.intersection(*(set(sample.kib) for sample in kept))):
        kib = [sample.kib[role] for sample in kept]
        minute = slope_of([sample.seconds / 60 for sample in kept], kib)
        request = slope_of([float(sample.requests) for sample in kept], kib)
        found.append(Slope(role, kib[0], kib[-1], minute, 1024 * request))
    return found


async def touch_cache(asker: Asker, pages: int) -> None:
    """Asks for prompts that nobody had, for twice the pages of the KV cache: some are kept free until all others are
    used, so that once does not write to every page."""
    chance = random.Random(0)
    free = asyncio.Semaphore(8)

    async def one() -> None:
        async with free:
            await asker.generate(text_input=prompt(chance, PROMPT_WORDS), max_tokens=1)

    await asyncio.gather(*(one() for _ in range(2 * pages * PAGE_TOKENS // PROMPT_WORDS + 1)))


async def soak(server: LocalServer, temporary: Path, minutes: float, clients: int, seed: int, touch: bool) -> Soak:
    """Runs the load and looks at the server before, meanwhile and after."""
    async with Asker(server) as asker:
        await Load(clients, seed).run(asker, requests=20 * clients)  # what first requests make is there to stay
        if touch:
            await touch_cache(asker, int(most(read_metrics(server.metrics), PAGES)))
        faults = []
        if not await becomes(lambda: is_idle(read_metrics(server.metrics)), AT_REST_SECONDS):
            faults.append("the server did not come to rest before the soak")
        await asyncio.sleep(1.0)
        before, counted_before = Holdings.of(server.pid, temporary), counted(read_metrics(server.metrics))
        load = Load(clients, seed + 1)
        samples: list[Sample] = []
        watching = asyncio.create_task(watch(server, load.ledger, samples, max(1.0, minutes / 4)))
        await load.run(asker, seconds=60 * minutes)
        watching.cancel()
        at_rest = await becomes(lambda: is_idle(read_metrics(server.metrics)), AT_REST_SECONDS)
    if not at_rest:
        faults.append("sequences or pages are left in the engine")
    if not await becomes(lambda: not Holdings.of(server.pid, temporary).more_than(before), AT_REST_SECONDS, every=1.0):
        faults += [f"left: {each}" for each in Holdings.of(server.pid, temporary).more_than(before)]
    result = Soak(load.ledger, slopes(samples), faults)
    result.faults += check_ledger(load.ledger, counted_before, counted(read_metrics(server.metrics)))
    if minutes >= JUDGED_MINUTES:
        result.faults += [
            f"{each.process} grows {each.bytes_per_request:.0f} bytes a request"
            for each in result.slopes
            if each.bytes_per_request > MOST_GROWTH and each.last_kib - each.first_kib > HEAP_NOISE_KIB
        ]
    return result


async def watch(server: LocalServer, ledger: Ledger, samples: list[Sample], every: float) -> None:
    """Takes a sample each `every` seconds until it is cancelled."""
    started = time.monotonic()
    while True:
        kib = await asyncio.to_thread(lambda: memory_kib(processes_by_role(server.pid)))
        samples.append(Sample(time.monotonic() - started, ledger.all_sent, kib))
        await asyncio.sleep(every)


def check_ledger(ledger: Ledger, before: tuple[float, float], after: tuple[float, float]) -> list[str]:
    """What does not add up: between what was sent and its ends, and between these and what Triton counted."""
    faults = [f"{n} requests of a kind that should not end so: {what}" for what, n in unexpected(ledger).items()]
    if ledger.missing:
        faults.append(f"{ledger.missing} requests have no end")
    unparsed = sum(ledger.sent[kind] for kind in UNPARSED)
    left = ledger.count(Outcome.LEFT)
    answered, failed = (round(now - then) for now, then in zip(after, before, strict=True))
    # Of those whose client left, Triton has counted those that it had begun to read.
    if not 0 <= answered + failed - (ledger.all_sent - left - unparsed) <= left:
        faults.append(
            f"Triton counted {answered} answered and {failed} failed; {ledger.all_sent} were sent, of which {unparsed} "
            f"are no requests to it and {left} were left"
        )
    if answered < ledger.count(Outcome.ANSWERED):
        faults.append(f"Triton counted {answered} answers, clients {ledger.count(Outcome.ANSWERED)}")
    return faults


def left_behind(pid: int, temporary: Path) -> list[str]:
    """What a server that has ended left in the file system."""
    return [f"left after its end: {name}" for name in [*regions([pid]), *(path.name for path in temporary.iterdir())]]


def report(result: Soak) -> str:
    lines = [result.ledger.table(), "", HEADING, *map(str, result.slopes), ""]
    ledger = result.ledger
    ends = ", ".join(f"{ledger.count(each)} {each.value}" for each in Outcome if ledger.count(each))
    lines.append(f"sent {ledger.all_sent} = {ends}")
    return "\n".join(lines + [f"BROKEN: {each}" for each in result.faults])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Keeps a server of its own under a mixed load and looks for what is lost, left or grows.",
        epilog="Options of serve.py may follow after --.",
    )
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N", help="default: %(default)g")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="at a time; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the load; default: %(default)s")
    parser.add_argument("--short", action="store_true", help="leave out the whole KV cache; only shows that it works")
    parser.add_argument("--output", type=Path, default=PROJECT / "build" / "soak", metavar="DIR")
    parser.add_argument("serve_arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.clients < 1:
        parser.error("--minutes must be above 0, --clients 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="gptj-soak-", dir="/tmp") as folder:
            environment = {**os.environ, "TMPDIR": folder}
            with local_server(
                options.serve_arguments, environment=environment, log=options.output / "server.log"
            ) as server:
                result = asyncio.run(
                    soak(server, Path(folder), options.minutes, options.clients, options.seed, not options.short)
                )
            result.faults += left_behind(server.pid, Path(folder))
    except (ServerFailedError, OSError) as error:
        print(f"soak.py: {error}", file=sys.stderr)
        return 1
    print(report(result))
    facts: dict[str, Any] = {"minutes": options.minutes, "clients": options.clients, "machine": processor()}
    facts |= {"requests": result.ledger.as_json(), "broken": result.faults}
    write_json(make_result("soak", result.slopes, **facts), options.output / "soak.json")
    return 1 if result.faults else 0
