"""A mixed load: requests of many sizes over both protocols, streams, beams, clients that leave, and bad input, each
counted. Which comes when is drawn from a seed. Knows no server's inside."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from gptj_triton.bench.holding.asking import Asker
from gptj_triton.bench.holding.outcomes import Ended, Ledger, Outcome
from gptj_triton.bench.perf_inputs import shipped_prompts

# Kinds of requests by name; what begins with BAD must be refused, what begins with LEFT is left by the client.
BAD, LEFT = "bad: ", "left: "
Kind = Callable[[Asker, random.Random], Awaitable[Ended]]


def prompt(chance: random.Random, words: int | None = None) -> str:
    """Text of some words; two are hardly ever equal."""
    text = " ".join(shipped_prompts()).split()
    return " ".join(chance.choices(text, k=words or chance.choice([1, 4, 16, 64, 200])))


def length(chance: random.Random) -> int:
    return chance.choice([1, 2, 4, 8, 8, 16, 32])


def row(chance: random.Random) -> dict[str, Any]:
    return {"text_input": prompt(chance), "max_tokens": length(chance), "temperature": 1.0, "top_p": 0.9}


LONG: dict[str, Any] = {"max_tokens": 400, "min_tokens": 400}
TIMEOUT = "generate, timeout"

KINDS: dict[str, Kind] = {
    "generate": lambda asker, chance: asker.generate(**row(chance)),
    "generate, words": lambda asker, chance: asker.generate(
        **row(chance), stop_words=["king", "."], bad_words=["wolf"]
    ),
    "generate, beams": lambda asker, chance: asker.generate(
        text_input=prompt(chance), max_tokens=length(chance), beam_width=chance.choice([2, 4])
    ),
    "generate, sequences": lambda asker, chance: asker.generate(**row(chance), num_return_sequences=3),
    TIMEOUT: lambda asker, chance: asker.generate(text_input=prompt(chance), **LONG, timeout=50_000),
    "infer": lambda asker, chance: asker.infer([row(chance) for _ in range(chance.choice([1, 3, 8]))]),
    "grpc": lambda asker, chance: asker.grpc([row(chance) for _ in range(chance.choice([1, 3, 8]))]),
    "stream": lambda asker, chance: asker.stream(**row(chance)),
    "stream, sequences": lambda asker, chance: asker.stream(**row(chance), num_return_sequences=2),
    "grpc stream": lambda asker, chance: asker.grpc_stream([row(chance)]),
    LEFT + "generate": lambda asker, chance: asker.generate(
        leave_after=chance.uniform(0.001, 0.1), **{**row(chance), "max_tokens": 64, "min_tokens": 64}
    ),
    LEFT + "grpc": lambda asker, chance: asker.grpc(
        [{**row(chance), "max_tokens": 64, "min_tokens": 64}], leave_after=chance.uniform(0.001, 0.1)
    ),
    LEFT + "stream": lambda asker, chance: asker.stream(
        leave_after_events=chance.choice([1, 2, 4]), text_input=prompt(chance), **LONG
    ),
    LEFT + "grpc stream": lambda asker, chance: asker.grpc_stream(
        [{"text_input": prompt(chance), **LONG}], leave_after_events=chance.choice([1, 2, 4])
    ),
    BAD + "range": lambda asker, chance: asker.generate(**{**row(chance), "top_p": 1.5}),
    BAD + "too long": lambda asker, chance: asker.generate(text_input=prompt(chance, 4000), max_tokens=4),
    BAD + "row of infer": lambda asker, chance: asker.infer([row(chance), {**row(chance), "max_tokens": 0}]),
    BAD + "grpc": lambda asker, chance: asker.grpc([{**row(chance), "temperature": -1.0}]),
    BAD + "stream": lambda asker, chance: asker.stream(**row(chance), beam_width=2),
    BAD + "field": lambda asker, chance: asker.generate(**row(chance), max_token=4),
}
# Triton's own parser refuses these, so that no model counts them.
UNPARSED: dict[str, Kind] = {
    BAD + "JSON": lambda asker, chance: asker.post("models/ensemble/generate", b'{"text_input": '),
    BAD + "type": lambda asker, chance: asker.generate(text_input="Once", max_tokens="four"),
}
ALL_KINDS = {**KINDS, **UNPARSED}
EXPECTED = {BAD: Outcome.REFUSED, LEFT: Outcome.LEFT}


@dataclass
class Load:
    """Clients that send one request after another until `until` (monotonic seconds) or `requests` are sent."""

    clients: int
    seed: int
    kinds: dict[str, Kind] = field(default_factory=lambda: dict(ALL_KINDS))
    ledger: Ledger = field(default_factory=Ledger)
    longest: float = 0.0  # seconds that any request took
    stopped: bool = False

    async def run(self, asker: Asker, seconds: float = float("inf"), requests: float = float("inf")) -> None:
        """Returns when every request has ended."""
        until, chance = time.monotonic() + seconds, random.Random(self.seed)
        names = list(self.kinds)

        async def client() -> None:
            while not self.stopped and time.monotonic() < until and self.ledger.all_sent < requests:
                name = chance.choice(names)
                self.ledger.sent[name] += 1
                ended = await self.kinds[name](asker, random.Random(chance.random()))
                self.longest = max(self.longest, ended.seconds)
                self.ledger.note(name, ended)
                if ended.outcome is Outcome.CUT:
                    await asyncio.sleep(0.05)  # nobody is there

        await asyncio.gather(*(client() for _ in range(self.clients)))


def unexpected(ledger: Ledger) -> dict[str, int]:
    """Ends that a server without faults does not give: `KIND: OUTCOME` and how many. A client that means to leave may
    be answered before, and a request is unavailable that waits for its whole timeout."""
    found = {}
    for kind, ended in ledger.ended.items():
        allowed = {EXPECTED.get(kind[:5], EXPECTED.get(kind[:6], Outcome.ANSWERED))}
        if kind.startswith(LEFT):
            allowed.add(Outcome.ANSWERED)
        if kind == TIMEOUT:
            allowed.add(Outcome.UNAVAILABLE)
        found.update({f"{kind}: {each.value}": n for each, n in ended.items() if each not in allowed})
    return found
