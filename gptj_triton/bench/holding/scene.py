"""Where a fault is staged: a running server, requests in flight, the moment of the fault, and what is seen after it.
Knows nothing of any single fault."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gptj_triton.bench.holding.asking import Asker
from gptj_triton.bench.holding.outcomes import Ended, Outcome
from gptj_triton.bench.holding.processes import processes_by_role
from gptj_triton.bench.local_server import LocalServer, local_server

# The launcher gives up after some restarts; here it is to go on.
RESTARTS = "--max-restarts=1000"
HANGS_AT_MOST, SERVES_WITHIN = 5.0, 10.0  # seconds after a fault, unless a case says otherwise
PROBE_EVERY, PROBE_SECONDS = 0.25, 3.0  # how often a small request is sent, and how long it may take
GIVEN_UP = 20.0  # seconds after which one stops waiting for what should have happened
ONE_TOKEN: dict[str, Any] = {"text_input": "Once upon a time", "max_tokens": 1}
LONG: dict[str, Any] = {"text_input": "Once upon a time", "max_tokens": 300, "min_tokens": 300}
# How a right request may end while parts of the server are down. Where tritonserver itself ends, it may be cut.
IN_WORDS = (Outcome.ANSWERED, Outcome.UNAVAILABLE)


@dataclass(frozen=True)
class Seen:
    """What a client saw of a fault, in words, and whether it should be so."""

    words: str
    ok: bool = True


@dataclass(frozen=True)
class Probe:
    """A small request: when it was sent, when it ended (monotonic seconds), and whether it was answered."""

    started: float
    ended: float
    ok: bool


@dataclass
class Scene:
    """A server on which one fault is staged."""

    server: LocalServer
    temporary: Path  # the server's directory for temporary files
    asker: Asker
    extra: Path  # a directory for what a case needs
    struck: float = field(default_factory=time.monotonic)
    hanging: float = 0.0  # seconds after the fault at which the last request ended that was in flight and got no answer
    _flying: list[asyncio.Task[Ended]] = field(default_factory=list)
    _probes: list[Probe] = field(default_factory=list)

    def fly(self, *requests: Coroutine[Any, Any, Ended]) -> None:
        """Starts requests that are to be in flight when the fault comes."""
        self._flying += [asyncio.create_task(request) for request in requests]

    async def fly_all_kinds(self, each: int = 2) -> None:
        """Long requests of every kind, and the time that they need to begin."""
        for _ in range(each):
            self.fly(self.asker.generate(**LONG), self.asker.infer([LONG]), self.asker.grpc([LONG]))
            self.fly(self.asker.stream(**LONG), self.asker.grpc_stream([LONG]))
        await asyncio.sleep(0.5)

    def strike(self, *roles: str, with_signal: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to processes of the server; this is the moment of the fault. Without any, notes the moment."""
        found = processes_by_role(self.server.pid)
        self.struck = time.monotonic()
        for role in roles:
            with contextlib.suppress(psutil.Error):
                found[role].send_signal(with_signal)

    async def landed(self) -> list[Ended]:
        """How the requests in flight ended."""
        ends = await asyncio.gather(*map(self._landing, self._flying))
        self._flying.clear()
        return ends

    async def _landing(self, request: asyncio.Task[Ended]) -> Ended:
        ended = await request
        if ended.outcome is not Outcome.ANSWERED:  # an answer takes its time
            self.hanging = max(self.hanging, time.monotonic() - self.struck)
        return ended

    async def served_again(self, within: float = GIVEN_UP) -> float | None:
        """Waits until a request that is sent from now on is answered; seconds from the fault until the server served
        again, 0 where it always did. None if that does not come."""
        called = time.monotonic()
        while time.monotonic() < called + within:
            if any(probe.ok and probe.started > called for probe in self._probes) and self._back() is not None:
                return self._back()
            await asyncio.sleep(0.05)
        return None

    def _back(self) -> float | None:
        """From the fault to the first answer after which no request failed."""
        since = [probe for probe in self._probes if probe.started >= self.struck]
        failed = max((probe.started for probe in since if not probe.ok), default=None)
        good = [probe.ended for probe in since if probe.ok and (failed is None or probe.started > failed)]
        return None if not good else 0.0 if failed is None else min(good) - self.struck

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Sends small requests all the time, whether or not those before have been answered."""
        probes: set[asyncio.Task[None]] = set()

        async def watch() -> None:
            while True:
                probes.add(task := asyncio.create_task(self._probe()))
                task.add_done_callback(probes.discard)
                await asyncio.sleep(PROBE_EVERY)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, *probes, return_exceptions=True)

    async def _probe(self) -> None:
        """A request with one answer, a stream, and `ready`."""
        started, ok = time.monotonic(), False
        with contextlib.suppress(asyncio.TimeoutError):
            small = asyncio.gather(
                self.asker.generate(**ONE_TOKEN), self.asker.stream(**ONE_TOKEN), self.asker.status("health/ready")
            )
            answered, streamed, ready = await asyncio.wait_for(small, PROBE_SECONDS)
            ok = ready == 200 and {answered.outcome, streamed.outcome} == {Outcome.ANSWERED}
        self._probes.append(Probe(started, time.monotonic(), ok))

    def role_pids(self) -> dict[str, int]:
        return {role: process.pid for role, process in processes_by_role(self.server.pid).items()}


@dataclass(frozen=True)
class Fault:
    """One way to hurt a server, and the seconds within which it must be over."""

    name: str
    stage: Callable[[Scene], Awaitable[Seen]]
    patience: float = 15.0  # seconds after which a request counts as hanging
    hangs_at_most: float = HANGS_AT_MOST
    serves_within: float = SERVES_WITHIN
    serve_arguments: Callable[[Path], Sequence[str]] | None = None  # in a directory for files: a server of its own
    ends_server: bool = False
    short: bool = False  # whether the short form has it


def all_in_words(ends: Sequence[Ended], also: Sequence[Outcome] = ()) -> Seen:
    """Whether each request ended with an answer, an error that says that the server is not there, or in one of the
    ways that are allowed `also`."""
    counts = Counter(each.outcome for each in ends)
    others = {each.words[:90] for each in ends if each.outcome not in (*IN_WORDS, *also)}
    words = ", ".join(f"{n} {outcome.value}" for outcome, n in counts.items())
    return Seen(f"{words} ({'; '.join(sorted(others)[:2])})" if others else words, set(counts) <= {*IN_WORDS, *also})


@contextlib.contextmanager
def staged_server(arguments: Sequence[str], log: Path, temporary: Path) -> Iterator[LocalServer]:
    """A server with `temporary` for its temporary files."""
    with local_server([RESTARTS, *arguments], environment={**os.environ, "TMPDIR": str(temporary)}, log=log) as server:
        yield server
