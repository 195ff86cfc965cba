"""`make compare`: a FastAPI service around `transformers` and this project's server, under the same load on the same
machine and checkpoint.

At each number of clients the systems come in turn, each with a server started for it alone, warmed up, measured and
stopped. Writes results.json, table.md and two plots; docs/comparison.md says what they mean. The load generator is
perf_analyzer, since it is there already and leaves the processor to the servers.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

from gptj_triton.bench.comparison.comparison import FEWEST_REQUESTS, Comparison
from gptj_triton.bench.comparison.load import drive
from gptj_triton.bench.comparison.report import MergeError, merge, ratios, summary
from gptj_triton.bench.comparison.systems import BASELINE, BATCHED, THIS, Setting, servers
from gptj_triton.bench.local_server import ServerFailedError
from gptj_triton.bench.perf_analyzer import PerfError, find_perf_analyzer
from gptj_triton.bench.results import Result, write_json
from gptj_triton.checkpoint.data_types import COMPUTE_TYPES
from gptj_triton.project import EMBEDDED_MODEL

QUICK = {"concurrency": [2], "prompt_tokens": 8, "output_tokens": 8, "requests_per_client": 3}


class ComparisonError(Exception):
    """The comparison cannot be made, or two systems gave different texts where they must not."""


def measure(options: argparse.Namespace) -> Result:
    """The whole result; what there is of it is in results.json after each measurement."""
    for name in ("config.json", "tokenizer.json"):
        if not (options.model / name).is_file():
            raise ComparisonError(f"{options.model} has no {name}")
    context = json.loads((options.model / "config.json").read_text())["n_positions"]
    if options.prompt_tokens + options.output_tokens > context:
        raise ComparisonError(f"--prompt-tokens + --output-tokens must be at most {context}, the model's context")
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    names = ("model", "device", "data_type", "engine_python", "baseline_python")
    setting = Setting(**{name: getattr(options, name) for name in names})
    with find_perf_analyzer() as analyzer:
        comparison = Comparison(functools.partial(drive, analyzer), tokenizer, options)
        for result in comparison.run(servers(setting)):
            write_json(result, options.output / "results.json")
    return comparison.result()


def must_be_equal(result: Result) -> bool:
    """Whether all systems must give the same texts: they do in fp32 on a CPU."""
    return (result["device"], result["data_type"]) == ("cpu", "fp32")


def write(result: Result, folder: Path) -> None:
    """results.json, table.md and, where matplotlib is, the plots."""
    write_json(result, folder / "results.json")
    (folder / "table.md").write_text(summary(result, BASELINE))
    if importlib.util.find_spec("matplotlib") is None:  # --draw draws it on another machine
        return
    from gptj_triton.bench.comparison.plots import draw_first_token, draw_throughput

    draw_throughput(result, folder / "throughput.png")
    draw_first_token(result, folder / "first_token.png")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares a FastAPI service around transformers with this server.")
    add = parser.add_argument
    add("--model", type=Path, default=EMBEDDED_MODEL, metavar="DIR", help="Hugging Face's layout; default: embedded")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of all; default: %(default)s")
    add("--data-type", choices=list(COMPUTE_TYPES), help="of all; default: fp32 on cpu, fp16 on cuda")
    add("--engine-python", metavar="PROGRAM", help="the Python of this project's engine (default: this one)")
    add("--baseline-python", default=sys.executable, metavar="PROGRAM", help="the baseline's (default: this one)")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    add("--output-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N", help="default: 1 4 16 64")
    requests_help = f"of a measurement, {FEWEST_REQUESTS} in all and three rounds at least; default: %(default)s"
    add("--requests-per-client", type=int, default=8, metavar="N", help=requests_help)
    phase_help = "fewer requests, but three rounds, where all would take longer; default: %(default)s"
    add("--phase-seconds", type=float, default=15.0, metavar="S", help=phase_help)
    add("--output", type=Path, default=Path("build/comparison"), metavar="DIR", help="default: %(default)s")
    add(
        "--draw",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help="measure nothing: join and draw what earlier runs wrote",
    )
    add("--quick", action="store_true", help="few clients and tokens: only shows that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    counts = (options.prompt_tokens, options.output_tokens, options.requests_per_client, *options.concurrency)
    if options.prompt_tokens < 4 or min(*counts, options.phase_seconds) < 1:
        parser.error("numbers must be 1 or more, --prompt-tokens 4: no two prompts are alike")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        earlier = [json.loads(path.read_text()) for path in options.draw]
        result = merge(earlier) if earlier else measure(options)
        write(result, options.output)
        print((options.output / "table.md").read_text())
        if must_be_equal(result) and any(each["equal"] < each["of"] for each in result["texts"]):
            raise ComparisonError("two systems gave different texts in fp32 on a CPU")
    except (PerfError, ServerFailedError, ComparisonError, MergeError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it
    times = {name: ratios(result["measurements"], name, THIS) for name in (BASELINE, BATCHED)}
    print(json.dumps({"benchmark": "comparison", "output": str(options.output), "times": times}))
    return 0
