"""Sends a server any input, over both protocols and to all models, and then by name what chance does not find.

The rule: what dies is back within 10 s, nothing hangs, every answer is well-formed, and no status is 500 but that of
Triton's own JSON parser. `--help` lists the options. Ends with status 1 where an input breaks the rule.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from tritonclient.grpc import service_pb2

from gptj_triton.bench.holding.asking import Asker
from gptj_triton.bench.holding.inputs import (
    HANGS,
    MANY_KEYS,
    AnyInput,
    GrpcInput,
    HttpInput,
    any_input,
    large_inputs,
    named_inputs,
)
from gptj_triton.bench.holding.outcomes import Ended, Outcome
from gptj_triton.bench.holding.processes import processes_by_role
from gptj_triton.bench.holding.raw_http import post_raw
from gptj_triton.bench.holding.scene import ONE_TOKEN, RESTARTS
from gptj_triton.bench.local_server import LocalServer, ServerFailedError, local_server
from gptj_triton.bench.machine import processor
from gptj_triton.bench.results import make_result, write_json
from gptj_triton.project import PROJECT

BACK_WITHIN, GIVEN_UP = 10.0, 60.0  # seconds
AT_ONCE = 8
SHORT_INPUTS, SHORT_KEYS = 500, 15_000
# A mount namespace of its own, in which /dev/shm is as small as Docker makes it.
IN_SMALL_SHARED_MEMORY = (
    *("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m shm /dev/shm && exec "$@"', "sh"),
)
BROKEN = (Outcome.FAILED, Outcome.HUNG, Outcome.MALFORMED)


@dataclass
class Finding:
    """What an input did that it should not; `input` may be one of several that were sent at once."""

    input: str
    what: str

    def __str__(self) -> str:
        return f"{self.what}\n    {self.input}"


@dataclass
class Fuzz:
    """What came of all inputs."""

    ends: Counter[Outcome] = field(default_factory=Counter)
    deaths: list[tuple[str, float]] = field(default_factory=list)  # of which processes, and seconds until served again
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Fuzz) -> None:
        """Adds what came of others, and says what is wrong."""
        self.ends.update(other.ends)
        self.deaths += other.deaths
        self.findings += other.findings
        for finding in other.findings:
            print(f"BROKEN: {finding}", flush=True)


def draw_inputs(count: int, seed_number: int) -> list[AnyInput]:
    """`count` inputs that the seed determines."""
    drawn: list[AnyInput] = []

    @seed(seed_number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(any_input)
    def draw(one: AnyInput) -> None:
        drawn.append(one)

    draw()
    return drawn[:count]


async def send(asker: Asker, server: LocalServer, one: AnyInput) -> Ended:
    if isinstance(one, HttpInput):
        return await post_raw(server.http, one.path, one.body, one.headers, one.chunk_bytes, patience=one.patience)
    return await asker.end(send_grpc(asker, one))


async def send_grpc(asker: Asker, one: GrpcInput) -> Ended:
    """As it is, which tritonclient would not: its own checks come before."""
    request = service_pb2.ModelInferRequest(model_name=one.model)
    for tensor in one.tensors:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.raw)
    for name, value in one.parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
        setattr(request.parameters[name], kind, value)
    if not one.model.endswith("_stream"):
        await asker.grpc_stub.ModelInfer(request)
        return Ended(Outcome.ANSWERED)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    async for response in asker.grpc_stub.ModelStreamInfer(once(request)):
        if response.error_message:
            return Ended(Outcome.REFUSED, response.error_message)
        if response.infer_response.parameters["triton_final_response"].bool_param:
            return Ended(Outcome.ANSWERED)
    return Ended(Outcome.CUT, "a stream without its last response")


async def once(request: Any) -> AsyncIterator[Any]:
    yield request


async def serves(asker: Asker) -> bool:
    """Whether every model that clients ask answers."""
    small = asyncio.gather(asker.generate(**ONE_TOKEN), asker.stream(**ONE_TOKEN), asker.grpc([ONE_TOKEN]))
    with contextlib.suppress(asyncio.TimeoutError):
        ends = await asyncio.wait_for(small, 3.0)
        return all(each.outcome is Outcome.ANSWERED for each in ends)
    return False


async def fuzz(server: LocalServer, inputs: Sequence[AnyInput], at_once: int = AT_ONCE) -> tuple[Fuzz, bool]:
    """Sends all, so many at once, and looks after each lot whether the server is as before. Stops where it is not back;
    the second value is false then.

    An input that was sent when another killed the server is not blamed for what it got."""
    result = Fuzz()
    async with Asker(server, HANGS) as asker:
        alive = living(server)
        for start in range(0, len(inputs), at_once):
            lot = inputs[start : start + at_once]
            ends = await asyncio.gather(*(send(asker, server, one) for one in lot))
            result.ends.update(each.outcome for each in ends)
            now = living(server)
            died = sorted(role for role, pid in alive.items() if now.get(role) != pid)
            if not died:
                wrong = [(one, end) for one, end in zip(lot, ends, strict=True) if end.outcome in BROKEN]
                result.findings += [Finding(str(one), str(end)[:300]) for one, end in wrong]
                cut = [one for one, end in zip(lot, ends, strict=True) if end.outcome is Outcome.CUT]
                if not cut and not wrong:
                    continue
            fell = time.monotonic()
            while not (back := await serves(asker)) and time.monotonic() - fell < GIVEN_UP:
                await asyncio.sleep(0.1)
            alive, seconds = living(server), time.monotonic() - fell
            among = "\n    ".join(map(str, lot))
            if died:
                result.deaths.append((", ".join(died), seconds))
            if not back or seconds > BACK_WITHIN:
                what = (
                    f"{', '.join(died) or 'no process'} died; {f'back after {seconds:.1f} s' if back else 'not back'}"
                )
                result.findings.append(Finding(among, what))
            hung = [one for one, end in zip(lot, ends, strict=True) if end.outcome is Outcome.HUNG]
            result.findings += [Finding(str(one), f"hung; {', '.join(died)} died") for one in hung if died]
            if not back:
                return result, False
    return result, True


def living(server: LocalServer) -> dict[str, int]:
    return {role: process.pid for role, process in processes_by_role(server.pid).items()}


def fuzz_with_restarts(lots: list[Sequence[AnyInput]], options: argparse.Namespace, before: Sequence[str] = ()) -> Fuzz:
    """Sends all lots; a server that does not come back is followed by another. Raises ServerFailedError."""
    together = Fuzz()
    while lots:
        with tempfile.TemporaryDirectory(prefix="gptj-fuzz-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            environment, log = {**os.environ, "TMPDIR": folder}, options.output / "server.log"
            with local_server(
                [RESTARTS, *options.serve_arguments], environment=environment, log=log, before=before
            ) as server:
                back = True
                while lots and back:
                    lot = lots.pop(0)
                    done, back = asyncio.run(fuzz(server, lot))
                    together.add(done)
                    if rest := lot[sum(done.ends.values()) :]:
                        lots.insert(0, rest)
                if not back:
                    for process in processes_by_role(server.pid).values():
                        process.kill()
    return together


def run(options: argparse.Namespace) -> Fuzz:
    """Random inputs, then those by name one after another, then large ones where /dev/shm is small."""
    inputs = draw_inputs(options.inputs, options.seed)
    print(f"{len(inputs)} inputs drawn", flush=True)
    named = [] if options.only_random else list(named_inputs(SHORT_KEYS if options.short else MANY_KEYS).values())
    result = fuzz_with_restarts([inputs, *([one] for one in named)], options)
    if options.only_random:
        return result
    if os.geteuid() != 0:
        print("a small /dev/shm is left out: it needs root")
        return result
    result.add(fuzz_with_restarts([[one] for one in large_inputs()], options, IN_SMALL_SHARED_MEMORY))
    return result


def report(result: Fuzz) -> str:
    ends = ", ".join(f"{n} {outcome.value}" for outcome, n in result.ends.most_common())
    times = [seconds for _, seconds in result.deaths]
    deaths = Counter(who for who, _ in result.deaths)
    died = f"; died: {dict(deaths)}, back after {max(times):.1f} s at most" if times else "; no process died"
    return f"{sum(result.ends.values())} inputs: {ends}{died}; {len(result.findings)} break the rule"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sends a server of its own any input and looks whether it keeps to its rule.",
        epilog="Options of serve.py may follow after --.",
    )
    parser.add_argument("--inputs", type=int, default=10_000, metavar="N", help="random ones; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the inputs; default: %(default)s")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_INPUTS} random ones, and shorter ones by name")
    parser.add_argument("--only-random", action="store_true", help="leave out the inputs by name")
    parser.add_argument("--output", type=Path, default=PROJECT / "build" / "fuzz", metavar="DIR")
    parser.add_argument("serve_arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.short:
        options.inputs = SHORT_INPUTS
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        result = run(options)
    except (ServerFailedError, OSError) as error:
        print(f"fuzz.py: {error}", file=sys.stderr)
        return 1
    print(report(result))
    facts = {"inputs": options.inputs, "seed": options.seed, "machine": processor()}
    facts |= {"ends": {outcome.value: n for outcome, n in result.ends.items()}, "deaths": result.deaths}
    write_json(make_result("fuzz", result.findings, **facts), options.output / "fuzz.json")
    return 1 if result.findings else 0
