"""Faults of the server's processes: each is killed, or stands still, while requests are in flight."""

from __future__ import annotations

import asyncio
import functools
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from gptj_triton.bench.holding.outcomes import Outcome
from gptj_triton.bench.holding.processes import ENGINE, TRITON, processes_by_role
from gptj_triton.bench.holding.scene import GIVEN_UP, ONE_TOKEN, Fault, Scene, Seen, all_in_words
from gptj_triton.project import EMBEDDED_MODEL

STUBS = ("preprocessing", "fastertransformer", "fastertransformer_stream", "postprocessing")
UNREADABLE_SECONDS = 6.0
READY_MAY_LAG = 0.5  # seconds between an engine's end and the first `ready` that says so
MODEL_COPY = "model"


async def struck(scene: Scene, role: str, with_signal: signal.Signals, cut: bool) -> Seen:
    """Sends a signal to one process under load; connections may be `cut`, if the case allows it."""
    await scene.fly_all_kinds()
    scene.strike(role, with_signal=with_signal)
    return all_in_words(await scene.landed(), also=[Outcome.CUT] if cut else [])


def signalled(name: str, role: str, with_signal: signal.Signals, cut: bool, short: bool = False) -> Fault:
    return Fault(name, functools.partial(struck, role=role, with_signal=with_signal, cut=cut), short=short)


async def timeout(scene: Scene) -> Seen:
    """A request's own time limit holds while the engine stands still."""
    scene.fly(scene.asker.generate(text_input="Once", max_tokens=900, min_tokens=900, timeout=1_000_000))
    await asyncio.sleep(0.3)
    scene.strike(ENGINE, with_signal=signal.SIGSTOP)
    return all_in_words(await scene.landed())


async def ready(scene: Scene) -> Seen:
    """While the engine is down `ready` is false, and requests are refused with the word that says so."""
    scene.strike(ENGINE)
    polls = wrong = refused = others = 0
    while (now := time.monotonic() - scene.struck) < 20.0:
        status, ended = await asyncio.gather(scene.asker.status("health/ready"), scene.asker.generate(**ONE_TOKEN))
        polls += 1
        if ended.outcome is Outcome.ANSWERED and status == 200:
            break
        refused += ended.outcome is Outcome.UNAVAILABLE
        others += ended.outcome not in (Outcome.ANSWERED, Outcome.UNAVAILABLE)
        wrong += status == 200 and now > READY_MAY_LAG
        await asyncio.sleep(0.02)
    words = f"{wrong} of {polls} polls ready while down; {refused} refused as unavailable, {others} otherwise"
    return Seen(words, wrong == 0 and others == 0 and refused > 0)


def serve_copy(folder: Path) -> Sequence[str]:
    """Options to serve a copy of the embedded model, which the case may take away."""
    shutil.copytree(EMBEDDED_MODEL, folder / MODEL_COPY)
    return ["--model", str(folder / MODEL_COPY)]


async def unreadable(scene: Scene) -> Seen:
    """The engine dies and its weights cannot be read for a while. The moment of the fault is that of their return."""
    weights = Path(scene.extra, MODEL_COPY, "model.safetensors")
    hidden = weights.rename(weights.with_suffix(".hidden"))
    await scene.fly_all_kinds(each=1)
    scene.strike(ENGINE)
    ends = await scene.landed()
    while time.monotonic() - scene.struck < UNREADABLE_SECONDS:
        ends.append(await scene.asker.generate(**ONE_TOKEN))
        await asyncio.sleep(0.2)
    hidden.rename(weights)
    scene.strike()
    return all_in_words(ends)


async def together(scene: Scene, *roles: str) -> Seen:
    """Several processes are killed at once."""
    await scene.fly_all_kinds()
    scene.strike(*roles)
    return all_in_words(await scene.landed(), also=[Outcome.CUT])


async def while_starting(scene: Scene) -> Seen:
    """Each new engine is killed before it serves, three times; the moment of the fault is that of the last."""
    await scene.fly_all_kinds(each=1)
    scene.strike(ENGINE)
    ends = await scene.landed()
    for _ in range(3):
        old = scene.role_pids().get(ENGINE)
        while (new := scene.role_pids().get(ENGINE)) in (None, old) and time.monotonic() < scene.struck + GIVEN_UP:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        scene.strike(ENGINE)
        ends.append(await scene.asker.generate(**ONE_TOKEN))
        if new is None:
            return Seen("no new engine was started", False)
    return all_in_words(ends)


async def triton_alone(scene: Scene) -> Seen:
    """tritonserver is killed; the engine goes on, so that its weights are not read again."""
    engine = processes_by_role(scene.server.pid)[ENGINE].pid
    seen = await struck(scene, TRITON, signal.SIGKILL, cut=True)
    await scene.served_again()
    same = scene.role_pids().get(ENGINE) == engine
    return Seen(f"{seen.words}; {'the same' if same else 'another'} engine", seen.ok and same)


FAULTS = [
    *(
        signalled(f"stub-killed-{model}", f"stub {model}", signal.SIGKILL, cut=True, short=model == "postprocessing")
        for model in STUBS
    ),
    *(signalled(f"stub-stopped-{model}", f"stub {model}", signal.SIGSTOP, cut=True) for model in STUBS),
    signalled("engine-killed", ENGINE, signal.SIGKILL, cut=False, short=True),
    signalled("engine-stopped", ENGINE, signal.SIGSTOP, cut=False, short=True),
    signalled("engine-aborted", ENGINE, signal.SIGABRT, cut=False),
    signalled("tritonserver-stopped", TRITON, signal.SIGSTOP, cut=True),
    Fault("tritonserver-killed", triton_alone),
    Fault("engine-and-stub-killed", lambda scene: together(scene, ENGINE, "stub postprocessing")),
    Fault("engine-and-tritonserver-killed", lambda scene: together(scene, ENGINE, TRITON)),
    Fault("engine-killed-while-starting", while_starting, serves_within=20.0),
    Fault("timeout", timeout),
    Fault("ready", ready),
    Fault("checkpoint-unreadable", unreadable, hangs_at_most=5.0, serve_arguments=serve_copy),
]
