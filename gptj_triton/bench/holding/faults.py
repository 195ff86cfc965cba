"""Breaks parts of a running server, one case after another, then kills its processes at random under load.

For each case: what clients saw, when the last request that hung ended, when the server served again. `--help` lists the
options. Ends with status 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.bench.holding import faults_of_access, faults_of_life, faults_of_processes, faults_of_requests
from gptj_triton.bench.holding.asking import Asker
from gptj_triton.bench.holding.kills import kill_at_random
from gptj_triton.bench.holding.processes import processes_by_role
from gptj_triton.bench.holding.scene import Fault, Scene, staged_server
from gptj_triton.bench.local_server import LocalServer, ServerFailedError
from gptj_triton.bench.machine import processor
from gptj_triton.bench.results import make_result, write_json
from gptj_triton.project import PROJECT

FAULTS = [*faults_of_requests.FAULTS, *faults_of_processes.FAULTS, *faults_of_access.FAULTS, *faults_of_life.FAULTS]
KILLS = "kills"
KILLS_PATIENCE = 15.0  # seconds after which a request counts as hanging
HEADING = f"{'case':<32} {'':<7} {'hung s':>6} {'again s':>7}  what clients saw"


@dataclass(frozen=True)
class Result:
    """Of one case. `again_s` is None where the server did not come back, or was meant to end."""

    case: str
    ok: bool
    hung_s: float
    again_s: float | None
    saw: str

    def __str__(self) -> str:
        again = "-" if self.again_s is None else f"{self.again_s:.1f}"
        return f"{self.case:<32} {'ok' if self.ok else 'BROKEN':<7} {self.hung_s:>6.1f} {again:>7}  {self.saw}"


class Stage:
    """The server of all cases that share one, started when the one before has ended."""

    def __init__(self, output: Path, arguments: Sequence[str]) -> None:
        self._output, self._arguments = output, arguments
        self._stack = contextlib.ExitStack()
        self._shared: tuple[LocalServer, Path, Path] | None = None

    async def run(self, fault: Fault) -> Result:
        """Stages one case. Raises ServerFailedError."""
        if fault.ends_server or fault.serve_arguments:
            with contextlib.ExitStack() as stack:
                return await run_case(fault, *self._start(stack, fault))
        return await run_case(fault, *self.shared())

    def shared(self) -> tuple[LocalServer, Path, Path]:
        if self._shared is None or self._shared[0].process.poll() is not None:
            self.close()
            self._shared = self._start(self._stack, None)
        return self._shared

    def renew(self) -> None:
        """Ends the shared server at once, which does not come back by itself; the next case gets another."""
        if self._shared is not None:
            for process in processes_by_role(self._shared[0].pid).values():
                process.kill()
        self.close()

    def close(self) -> None:
        self._shared = None
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack, fault: Fault | None) -> tuple[LocalServer, Path, Path]:
        """The server, its directory for temporary files, and one for the case."""
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="gptj-held-", dir="/tmp", ignore_cleanup_errors=True)
        )
        temporary, extra = Path(folder, "t"), Path(folder, "case")
        temporary.mkdir()
        extra.mkdir()
        more = fault.serve_arguments(extra) if fault and fault.serve_arguments else []
        name = re.sub(r"\W+", "-", fault.name) if fault else "shared"
        log = self._output / f"{name}.log"
        server = stack.enter_context(staged_server([*self._arguments, *more], log, temporary))
        return server, temporary, extra


async def run_case(fault: Fault, server: LocalServer, temporary: Path, extra: Path) -> Result:
    async with Asker(server, fault.patience) as asker:
        scene = Scene(server, temporary, asker, extra)
        if fault.ends_server:
            seen, again = await fault.stage(scene), None
            back = True
        else:
            async with scene.watched():
                seen = await fault.stage(scene)
                again = await scene.served_again()
            back = again is not None and again <= fault.serves_within
    ok = seen.ok and back and scene.hanging <= fault.hangs_at_most
    return Result(fault.name, ok, scene.hanging, again, seen.words)


async def run_kills(stage: Stage, count: int, seed: int) -> Result:
    server, temporary, extra = stage.shared()
    async with Asker(server, KILLS_PATIENCE) as asker:
        kills = await kill_at_random(Scene(server, temporary, asker, extra), count, seed)
    times = [seconds for _, seconds in kills.again if seconds is not None]
    words = "; ".join([str(kills), *kills.broken[:4]])
    return Result(KILLS, not kills.broken, kills.load.longest, max(times, default=None), words)


async def run(options: argparse.Namespace) -> list[Result]:
    chosen = [fault for fault in FAULTS if fault.name in options.only]
    results = []
    with contextlib.closing(Stage(options.output, options.serve_arguments)) as stage:
        for fault in chosen:
            result = await stage.run(fault)
            print(result, flush=True)
            results.append(result)
            if result.again_s is None and not fault.ends_server:
                stage.renew()
        if KILLS in options.only and options.kills:
            results.append(await run_kills(stage, options.kills, options.seed))
            print(results[-1], flush=True)
    return results


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    names = [*(fault.name for fault in FAULTS), KILLS]
    parser = argparse.ArgumentParser(
        description="Breaks parts of a server of its own and looks what its clients see.",
        epilog=f"Cases: {', '.join(names)}. Options of serve.py may follow after --.",
    )
    parser.add_argument("--only", action="append", choices=names, metavar="CASE", help="this case; may be repeated")
    parser.add_argument(
        "--kills", type=int, default=50, metavar="N", help="at random, under load; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the kills; default: %(default)s")
    parser.add_argument("--short", action="store_true", help="a few cases and 4 kills")
    parser.add_argument("--output", type=Path, default=PROJECT / "build" / "faults", metavar="DIR")
    parser.add_argument("serve_arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.short:
        options.kills = 4
    options.only = options.only or [fault.name for fault in FAULTS if fault.short or not options.short] + [KILLS]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    print(HEADING)
    try:
        results = asyncio.run(run(options))
    except (ServerFailedError, OSError) as error:
        print(f"faults.py: {error}", file=sys.stderr)
        return 1
    write_json(make_result("faults", results, machine=processor()), options.output / "faults.json")
    broken = [result.case for result in results if not result.ok]
    print(
        f"{len(results) - len(broken)} of {len(results)} cases hold"
        + (f"; broken: {', '.join(broken)}" if broken else "")
    )
    return 1 if broken else 0
