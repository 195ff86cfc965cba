"""Kills of the engine, of stubs and of tritonserver, one after another at random, under a mixed load."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from gptj_triton.bench.holding.load import Load, unexpected
from gptj_triton.bench.holding.outcomes import Outcome
from gptj_triton.bench.holding.processes import ENGINE, TRITON, processes_by_role
from gptj_triton.bench.holding.scene import SERVES_WITHIN, Scene

CLIENTS = 8
# What a request may come to when processes are killed: connections end with tritonserver.
FAIR = {Outcome.ANSWERED, Outcome.REFUSED, Outcome.LEFT, Outcome.UNAVAILABLE, Outcome.CUT}


@dataclass
class Kills:
    """What came of all of them."""

    again: list[tuple[str, float | None]]  # who was killed, and after how many seconds requests were answered again
    load: Load

    @property
    def broken(self) -> list[str]:
        """Promises that were not kept, in words."""
        ledger = self.load.ledger
        found = [
            f"{role}: {'not serving again' if s is None else f'serving again after {s:.1f} s'}"
            for role, s in self.again
            if s is None or s > SERVES_WITHIN
        ]
        found += [f"{n} requests {each.value}" for each in Outcome if each not in FAIR and (n := ledger.count(each))]
        wrong = {what: n for what, n in unexpected(ledger).items() if what.endswith((": answered", ": refused"))}
        found += [f"{what} {n}" for what, n in wrong.items()]
        return found + ([f"{ledger.missing} requests without an end"] if ledger.missing else [])

    def __str__(self) -> str:
        times = sorted(seconds for _, seconds in self.again if seconds is not None)
        ledger = self.load.ledger
        ends = ", ".join(f"{n} {each.value}" for each in Outcome if (n := ledger.count(each)))
        again = f"serving again after {times[len(times) // 2]:.1f} s (median), {times[-1]:.1f} (worst)" if times else ""
        return f"{len(self.again)} kills: {again}; sent {ledger.all_sent} = {ends}; longest {self.load.longest:.1f} s"


async def kill_at_random(scene: Scene, count: int, seed: int) -> Kills:
    """Kills, waits until the server serves, and goes on, `count` times. Stops early where it does not come back."""
    chance = random.Random(seed)
    load = Load(CLIENTS, seed)
    kills = Kills([], load)
    sending = asyncio.create_task(load.run(scene.asker))
    async with scene.watched():
        for _ in range(count):
            await asyncio.sleep(chance.uniform(0.3, 2.0))
            stubs = [role for role in processes_by_role(scene.server.pid) if role.startswith("stub")]
            role = chance.choice([ENGINE, TRITON, chance.choice(stubs or [TRITON])])
            scene.strike(role)
            again = await scene.served_again()
            kills.again.append((role, again))
            if again is None:
                break
    load.stopped = True
    ended = time.monotonic()
    await sending
    load.longest = max(load.longest, time.monotonic() - ended)
    return kills
