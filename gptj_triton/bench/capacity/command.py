"""How many replicas a load needs, by simulating the engine's own scheduler with step times that were measured.

Steps are those of a GPU that benchmark_gpu.py measured, or of this machine: --calibrate. Nothing here needs a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gptj_triton.bench.capacity import replica_files, report, validation, whole_runs
from gptj_triton.bench.capacity.calibration import STAGE_SECONDS, STAGES, calibrate, settings_of
from gptj_triton.bench.capacity.mix import LENGTHS, Lengths, Mix, of_lengths, of_log, read_log
from gptj_triton.bench.capacity.open_loop import Texts
from gptj_triton.bench.capacity.recording_engine import recording_server
from gptj_triton.bench.capacity.sizing import Sizing, Wanted
from gptj_triton.bench.local_server import ServerFailedError
from gptj_triton.bench.machine import processor
from gptj_triton.bench.results import make_result, write_json
from gptj_triton.engine.kv_cache import PAGE_SIZE
from gptj_triton.project import PROJECT

H100 = PROJECT / "docs" / "performance-h100.json"
ENGINE_PARAMETERS = ("max_sequences", "step_tokens", "max_waiting_requests", "max_waiting_tokens")
QUICK = {"seconds": 1.0, "requests": 40, "stage": 0.3, "clients": [1, 4]}


def number(least: float, most: float, whole: bool = False) -> Callable[[str], float]:
    """A type for argparse: a number in a range, which its error names."""

    def parse(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            kind = "whole numbers" if whole else "numbers"
            raise argparse.ArgumentTypeError(f"{text!r}, allowed: {kind} from {least:,g} to {most:,g}")
        return value

    return parse


def lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def counts(text: str) -> list[int]:
    parse = number(1, 1000, whole=True)
    return [int(parse(each)) for each in text.split(",")]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    positive, count = number(1e-6, 1e9), number(1, 1e9, whole=True)
    add("--steps", type=Path, metavar="FILE", help="step times (default: those of an H100, fp16)")
    add("--rate", type=positive, metavar="N", help="requests a second (default: that of the log)")
    add("--prompt", type=lengths, metavar="LENGTHS", help=f"tokens in: {LENGTHS}")
    add("--output", type=lengths, metavar="LENGTHS", help="tokens out, likewise")
    add("--log", type=Path, metavar="FILE", help="in their place: JSON lines with prompt_tokens, output_tokens, and at")
    add("--shared-prefix", type=number(0, 1e9, True), default=0, metavar="N", help="tokens that begin all prompts")
    add("--first-token-ms", type=positive, default=math.inf, metavar="MS", help="the most, p99 (default: any)")
    add(
        "--between-tokens-ms",
        type=positive,
        default=math.inf,
        metavar="MS",
        help="the most, p99 of all pairs of tokens",
    )
    add("--mean-between-ms", type=positive, default=math.inf, metavar="MS", help="the most, p99 of requests' means")
    for name in ENGINE_PARAMETERS:
        add(f"--{name.replace('_', '-')}", type=count, metavar="N", help="the engine's parameter")
    add("--kv-cache-tokens", type=count, metavar="N", help="what the KV cache holds, as the engine's log says it")
    add("--own-ms", type=number(0, 1e6), metavar="MS", help="of a request outside the engine (default: 3, or measured)")
    add("--gpus", type=count, default=1, metavar="N", help="of a replica (default: 1)")
    add("--price", type=number(0, 1e6), metavar="PRICE", help="of a GPU's hour")
    add("--seconds", type=number(1, 86400), default=60.0, metavar="N", help="of load in a simulation (default: 60)")
    add("--seed", type=number(0, 1e9, True), default=0, metavar="N", help="default: 0")
    add("--surge", type=number(1, 100), metavar="FACTOR", help="what becomes of a load that grows by so much at once")
    add(
        "--surge-delay", type=number(0, 3600), default=60.0, metavar="S", help="until more replicas serve (default: 60)"
    )
    add("--json", type=Path, metavar="FILE", help="where to write the result besides")
    add("--plot", type=Path, metavar="PNG", help="where to draw latency against requests a second")
    add("--calibrate", type=Path, metavar="FILE", help="measure the steps of a server on this machine, into FILE")
    validate_help = "compare with measurements: a GPU's whole runs where --steps is given, else a server here"
    add("--validate", action="store_true", help=validate_help)
    add("--requests", type=count, default=1200, metavar="N", help="of each load of --validate (default: 1200)")
    add(
        "--stage",
        type=number(0.1, 600),
        default=STAGE_SECONDS,
        metavar="S",
        help="of each number of clients of a calibration",
    )
    add("--clients", type=counts, default=STAGES, metavar="N,N,...", help="these numbers (default: 1 to 128, doubled)")
    add("--quick", action="store_true", help="other defaults, which only show that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    if options.log and (options.prompt or options.output):
        parser.error("--log stands in the place of --prompt and --output: give the one or the others")
    if bool(options.prompt) != bool(options.output):
        parser.error("--prompt and --output go together")
    plans = not options.validate and not options.calibrate
    if plans and not (options.log or options.prompt):
        parser.error("lengths are missing: --prompt and --output, or --log")
    if plans and options.prompt and options.rate is None:
        parser.error("--rate is missing, allowed: requests a second above 0")
    return options


def changes(options: argparse.Namespace) -> dict[str, int]:
    """The settings of the engine that were given."""
    found = {name: getattr(options, name) for name in ENGINE_PARAMETERS if getattr(options, name) is not None}
    if options.kv_cache_tokens is not None:
        found["num_pages"] = max(1, options.kv_cache_tokens // PAGE_SIZE)
    return found


def mix_of(options: argparse.Namespace) -> tuple[Mix, float]:
    """What comes, and how much of it a second. ValueError where the log says no rate."""
    if options.log is None:
        prompt = options.prompt or Lengths.parse("uniform:8,64")
        output = options.output or Lengths.parse("uniform:8,40")
        return of_lengths(prompt, output, options.shared_prefix), options.rate or 0.0
    entries = read_log(options.log)
    rate = options.rate
    if rate is None:
        if entries[-1].at == 0:
            raise ValueError(f"{options.log}: no moments (at) in it, from which a rate follows; give --rate")
        rate = (len(entries) - 1) / entries[-1].at
    return of_log(entries, options.shared_prefix), rate


def run_plan(options: argparse.Namespace) -> int:
    own = None if options.own_ms is None else options.own_ms / 1e3
    kind = replica_files.read(options.steps or H100, changes(options), own)
    mix, rate = mix_of(options)
    longest = max(each.prompt + each.output for each in mix.at_once(1000, options.seed))
    most = min(kind.settings.context_length, kind.settings.num_pages * kind.settings.page_size)
    if longest > most:
        raise ValueError(f"a request has {longest} tokens, allowed: up to {most}, the context or the KV cache")
    wanted = Wanted(options.first_token_ms, options.between_tokens_ms, options.mean_between_ms)
    print(report.of_kind(kind))
    sizing = Sizing(kind.times, kind.settings, mix, options.seconds, options.seed)
    plan = sizing.plan(rate, wanted)
    if plan is None:
        print("capacity.py: not even a replica that is nearly idle meets what is wanted", file=sys.stderr)
        return 1
    print(report.of_plan(plan, options.gpus, options.price))
    surge = sizing.surge(plan, wanted, options.surge, options.surge_delay) if options.surge else None
    if surge is not None:
        print(surge)
    if options.json:
        facts = {"machine": kind.machine, "rate": rate, "settings": dataclasses.asdict(kind.settings)}
        facts |= {"replicas": plan.replicas, "share": plan.share, "gpu_hours_a_day": 24 * plan.replicas * options.gpus}
        facts |= {"saturation": dataclasses.asdict(plan.saturation), "seen": dataclasses.asdict(plan.seen)}
        write_json(make_result("capacity", plan.points, **facts), options.json)
    if options.plot:
        from gptj_triton.bench.capacity.plot import draw  # needs matplotlib, which is an extra

        draw(plan, wanted, f"One replica on {kind.machine}, simulated", options.plot)
    return 0


def run_calibration(options: argparse.Namespace) -> int:
    mix, _ = mix_of(options)
    with tempfile.TemporaryDirectory(prefix="gptj-capacity-") as folder:
        recording = Path(folder, "steps")
        with recording_server(Path(folder), recording) as server:
            found = calibrate(
                server.http, recording, mix, Texts(options.seed), options.seed, options.stage, options.clients
            )
        times = found.times()
        settings = settings_of(recording, found.own_seconds(times))
    facts = replica_files.written(times, settings)
    write_json(make_result("steps", [], machine=processor(), **facts), options.calibrate)
    print(report.of_kind(replica_files.read(options.calibrate, {}, None)))
    return 0


def run_validation(options: argparse.Namespace) -> int:
    rows: list[object] = []
    if options.steps:
        kind = replica_files.read(options.steps, changes(options), None)
        print(f"{report.of_kind(kind)}\n{whole_runs.HEADING}")
        for run in whole_runs.whole_runs(kind, 20_000 if options.quick else math.inf):
            print(run, flush=True)
            rows.append(run)
        if not rows:
            raise ValueError(f"{options.steps}: no whole runs in it, as benchmark_gpu.py measures them")
    else:
        mix, _ = mix_of(options)
        for found in validation.validate(mix, options.requests, options.stage, options.clients, options.seed):
            print(found, flush=True)
            if isinstance(found, validation.Level):
                rows += found.rows
    if options.json:
        write_json(make_result("capacity validation", rows, machine=processor()), options.json)
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.calibrate:
            return run_calibration(options)
        return run_validation(options) if options.validate else run_plan(options)
    except (ValueError, OSError, ServerFailedError) as error:
        print(f"capacity.py: {error}", file=sys.stderr)
        return 1
