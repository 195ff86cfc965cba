"""Before and after, `make compare`: a FastAPI service around `transformers` and this project's server, under the same
load on the same machine and checkpoint.

At each number of clients the systems come in turn, each with a server started for it alone, warmed up, measured and
stopped. Writes results.json, table.md and two plots; docs/comparison.md says what they mean. The load generator is
perf_analyzer, since it is there already and leaves the processor to the servers.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from gptj_triton.bench.comparison.cost import measure_cost
from gptj_triton.bench.comparison.load import Exchange, drive
from gptj_triton.bench.comparison.prompts import make_prompts
from gptj_triton.bench.comparison.report import Result, merge, ratios, summary
from gptj_triton.bench.comparison.results import Row, count_equal, make_row, request_count
from gptj_triton.bench.comparison.systems import AFTER, BATCHED, BEFORE, STREAMED, Setting, in_turn
from gptj_triton.bench.local_server import ServerFailedError
from gptj_triton.bench.machine import gpu_name, processor
from gptj_triton.bench.perf_analyzer import PerfAnalyzer, PerfError, find_perf_analyzer
from gptj_triton.project import EMBEDDED_MODEL

SYSTEMS = (BEFORE, BATCHED, AFTER, STREAMED)
QUICK = {"concurrency": [2], "prompt_tokens": 8, "output_tokens": 8, "requests_per_client": 2}
FEWEST_REQUESTS = 16
WARM_UP_TOKENS = 4
TOO_LONG = 6  # times --phase-seconds: what would take longer at one request a client is left out


class ComparisonError(Exception):
    """The comparison cannot be made, or before and after gave different texts where they must not."""


class Comparison:
    """All measurements, as they are made."""

    def __init__(self, analyzer: PerfAnalyzer, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        self._analyzer, self._tokenizer, self._options = analyzer, tokenizer, options
        self._texts: dict[int, dict[str, dict[str, str]]] = {}  # clients, system, prompt
        self._rates: dict[str, float] = {}  # the most requests a second of each system so far
        self._rows: list[Row] = []
        self._left_out: list[str] = []

    def run(self, setting: Setting) -> Iterator[Result]:
        """The result so far after each measurement, with a progress bar on stderr. Raises PerfError and
        ServerFailedError."""
        with tqdm(total=len(self._options.concurrency) * len(SYSTEMS), unit="measurement") as bar:
            for clients in self._options.concurrency:
                for system in in_turn(setting):
                    with system as running:
                        for name, url in running.doors.items():
                            bar.set_description(f"{name}, {clients} clients")
                            self._measure(running.pid, name, url, clients)
                            bar.update()
                            yield self._result()

    def _measure(self, pid: int, name: str, url: str, clients: int) -> None:
        options = self._options
        self._drive(url, f"{clients}, {name}, warm-up", clients, clients, WARM_UP_TOKENS)
        if name not in self._rates:
            [alone] = self._drive(url, f"{clients}, {name}, alone", 1, 1, options.output_tokens)
            self._rates[name] = 1 / (alone.last - alone.sent)
        rate = self._rates[name]
        if clients / rate > TOO_LONG * options.phase_seconds:
            self._left_out.append(f"{name} at {clients} clients: {clients} requests would take {clients / rate:.0f} s")
            return
        fewest = 0 if options.quick else FEWEST_REQUESTS
        count = request_count(clients, options.requests_per_client, fewest, rate, options.phase_seconds)
        # The same prompts for all servers; but the two doors of one share an engine, which keeps what it computed.
        prompts = f"{clients}, streamed" if name == STREAMED else f"{clients}"
        exchanges, cost = measure_cost(pid, lambda: self._drive(url, prompts, count, clients, options.output_tokens))
        row = make_row(name, clients, exchanges, options.output_tokens, cost)
        self._rows.append(row)
        self._rates[name] = max(rate, row.requests_per_second)
        self._texts.setdefault(clients, {})[name] = {exchange.prompt: exchange.text for exchange in exchanges}

    def _drive(self, url: str, prompts: str, count: int, clients: int, output_tokens: int) -> list[Exchange]:
        """`count` requests with the prompts of that name."""
        length = {"max_tokens": output_tokens, "min_tokens": output_tokens}
        texts = make_prompts(self._tokenizer, self._options.prompt_tokens, count, prompts)
        bodies = [{"text_input": text, **length} for text in texts]
        return drive(self._analyzer, url, bodies, clients, 2 * TOO_LONG * self._options.phase_seconds)

    def _equal_texts(self) -> list[dict[str, Any]]:
        """How many of the prompts that were answered by `before` too got the same text."""
        found = []
        for clients, systems in self._texts.items():
            for system in (BATCHED, AFTER):
                equal, of = count_equal(systems.get(BEFORE, {}), systems.get(system, {}))
                if of:
                    found.append({"clients": clients, "system": system, "equal": equal, "of": of})
        return found

    def _result(self) -> Result:
        """What results.json holds."""
        options = self._options
        gpu = None if options.device == "cpu" else gpu_name()
        return {
            "benchmark": "comparison",
            "model": options.model.name,
            "machine": gpu or processor(),
            "exact": gpu is None and options.data_type in (None, "fp32"),
            "prompt_tokens": options.prompt_tokens,
            "output_tokens": options.output_tokens,
            "rows": [dataclasses.asdict(row) for row in self._rows],
            "texts": self._equal_texts(),
            "left_out": self._left_out,
        }


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
    result: Result = {}
    with find_perf_analyzer() as analyzer:
        for result in Comparison(analyzer, tokenizer, options).run(setting):
            write_json(result, options.output)
    return result


def write_json(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")


def write(result: Result, folder: Path) -> None:
    """results.json, table.md and, where matplotlib is, the plots."""
    write_json(result, folder)
    (folder / "table.md").write_text(summary(result))
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
    add("--data-type", choices=["fp32", "fp16", "bf16"], help="of all; default: fp32 on cpu, fp16 on cuda")
    add("--engine-python", metavar="PROGRAM", help="the Python of this project's engine (default: this one)")
    add("--baseline-python", default=sys.executable, metavar="PROGRAM", help="the baseline's (default: this one)")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    add("--output-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N", help="default: 1 4 16 64")
    requests_help = f"of a measurement, {FEWEST_REQUESTS} in all at least; default: %(default)s"
    add("--requests-per-client", type=int, default=8, metavar="N", help=requests_help)
    phase_help = "fewer requests, but one a client, where all would take longer; default: %(default)s"
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
        if result["exact"] and any(each["equal"] < each["of"] for each in result["texts"]):
            raise ComparisonError("before and after gave different texts in fp32 on a CPU")
    except (PerfError, ServerFailedError, ComparisonError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it
    times_before = {str(clients): ratio for clients, ratio in ratios(result["rows"], BEFORE, AFTER).items()}
    print(json.dumps({"benchmark": "comparison", "output": str(options.output), "times_before": times_before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
