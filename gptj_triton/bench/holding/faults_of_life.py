"""The end of a server: asked to stop under load, or killed with all its processes at once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from pathlib import Path

import psutil

from gptj_triton.bench.holding.outcomes import Outcome
from gptj_triton.bench.holding.processes import ENGINE, LAUNCHER, TRITON, processes_by_role, regions
from gptj_triton.bench.holding.scene import LONG, ONE_TOKEN, Fault, Scene, Seen, all_in_words, staged_server
from gptj_triton.serving.command import REQUESTS_CUT

STREAMS = 48
STOPS_WITHIN, IDLE_STOPS_WITHIN = 60.0, 8.0  # seconds


async def ended(scene: Scene, within: float) -> float | None:
    """Seconds after the fault at which the launcher ended; None if it did not."""
    with contextlib.suppress(Exception):
        await asyncio.to_thread(scene.server.process.wait, within)
        return time.monotonic() - scene.struck
    return None


async def sigterm(scene: Scene) -> Seen:
    """Asked to stop with streams under way: new work is refused, each stream ends in words, the status tells."""
    long = {**LONG, "max_tokens": 1000, "min_tokens": 1000}
    scene.fly(*(scene.asker.stream(**long) for _ in range(STREAMS)))
    _, idle = await asyncio.open_connection(*scene.server.http.split(":"))
    await asyncio.sleep(2.0)
    scene.strike(LAUNCHER, with_signal=signal.SIGTERM)
    await asyncio.sleep(0.5)
    draining = await scene.asker.status("health/ready")
    late = await scene.asker.generate(**ONE_TOKEN)
    ends = await scene.landed()
    took = await ended(scene, STOPS_WITHIN)
    scene.hanging = 0.0  # a drain may take as long as it is given
    idle.close()
    status = scene.server.process.poll()
    cut = any(each.outcome is not Outcome.ANSWERED for each in ends)
    seen = all_in_words(ends)
    right = seen.ok and took is not None and draining != 200 and late.outcome is not Outcome.ANSWERED
    words = f"{seen.words}; ready {draining}, new work {late.outcome.value}, status {status} after {took or 0:.0f} s"
    return Seen(words, right and status == (REQUESTS_CUT if cut else 0))


async def idle_connection(scene: Scene) -> Seen:
    """An idle connection does not hold up the end."""
    _, writer = await asyncio.open_connection(*scene.server.http.split(":"))
    scene.strike(LAUNCHER, with_signal=signal.SIGTERM)
    took = await ended(scene, STOPS_WITHIN)
    writer.close()
    status = scene.server.process.poll()
    return Seen(
        f"status {status} after {took or 0:.1f} s", status == 0 and took is not None and took < IDLE_STOPS_WITHIN
    )


async def killed_together(scene: Scene) -> Seen:
    """All processes are killed at once; the next start of the same user removes what they left."""
    await scene.fly_all_kinds(each=1)
    everybody = processes_by_role(scene.server.pid)
    scene.strike(LAUNCHER, TRITON, ENGINE, *(role for role in everybody if role.startswith("stub")))
    await scene.landed()
    psutil.wait_procs(list(everybody.values()), timeout=5)
    return cleaned_by_the_next(scene)


async def launcher_killed(scene: Scene) -> Seen:
    """The launcher alone is killed: its processes end by themselves, and the next start removes what they left."""
    await scene.fly_all_kinds(each=1)
    everybody = processes_by_role(scene.server.pid)
    scene.strike(LAUNCHER)
    ends = await scene.landed()
    _, living = psutil.wait_procs(list(everybody.values()), timeout=40)
    seen, cleaned = all_in_words(ends, also=[Outcome.CUT]), cleaned_by_the_next(scene)
    scene.hanging = 0.0  # a drain
    return Seen(
        f"{seen.words}; {len(living)} processes live on; {cleaned.words}", seen.ok and cleaned.ok and not living
    )


def cleaned_by_the_next(scene: Scene) -> Seen:
    """Starts a server with the same directory for temporary files, and looks for what the one before left."""
    before = {path.name for path in scene.temporary.iterdir()}
    with staged_server([], Path(scene.extra, "next.log"), scene.temporary):
        now = {path.name for path in scene.temporary.iterdir()}
    after = [path.name for path in scene.temporary.iterdir() if path != scene.extra]
    left = [*regions([scene.server.pid]), *sorted(after), *sorted((before & now) - {scene.extra.name})]
    return Seen(", ".join(left[:4]) or "all removed", not left)


FAULTS = [
    Fault("sigterm", sigterm, patience=90.0, ends_server=True, short=True),
    Fault("idle-connection", idle_connection, ends_server=True),
    Fault("killed-together", killed_together, ends_server=True),
    Fault("launcher-killed", launcher_killed, patience=60.0, ends_server=True),
]
