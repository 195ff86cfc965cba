"""Measures with Triton's own perf_analyzer, at several concurrencies, `make perf`: `ensemble` over HTTP and gRPC, and
`ensemble_stream` over gRPC. Prints a table, and writes it as CSV and as a plot.

Knows nothing of how the server works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.bench.local_server import Addresses, ServerFailedError, local_server
from gptj_triton.bench.machine import processor
from gptj_triton.bench.perf_analyzer import PerfAnalyzer, PerfError, find_perf_analyzer
from gptj_triton.bench.perf_inputs import INPUTS
from gptj_triton.bench.perf_plot import draw
from gptj_triton.bench.results import Result, make_result, write_csv
from gptj_triton.client import MODEL, STREAMING_MODEL, Client, ClientError, host_and_port

OUTPUT = Path("build/perf")
# Arguments of perf_analyzer for each protocol; a stream's latency is until its last response.
PROTOCOLS = {
    "http": ["-m", MODEL, "-i", "http"],
    "grpc": ["-m", MODEL, "-i", "grpc"],
    "stream": ["-m", STREAMING_MODEL, "-i", "grpc", "--streaming", "--async"],
}
NAMES = {"http": f"{MODEL}, HTTP", "grpc": f"{MODEL}, gRPC", "stream": f"{STREAMING_MODEL}, gRPC"}
LOADED_WITHIN = 900.0  # seconds, for weights of some gigabytes


@dataclass(frozen=True)
class Measurement:
    """What perf_analyzer saw at one concurrency; `protocol` is one of PROTOCOLS."""

    protocol: str
    concurrency: int
    requests_per_second: float
    responses_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    def __str__(self) -> str:
        return (
            f"{self.concurrency:>11}  {self.protocol:<8}  {self.requests_per_second:>10.2f}"
            f"  {self.responses_per_second:>11.2f}  {self.p50_ms:>9.1f}  {self.p90_ms:>9.1f}  {self.p99_ms:>9.1f}"
        )


HEADING = (
    f"{'concurrency':>11}  {'protocol':<8}  {'requests/s':>10}  {'responses/s':>11}"
    f"  {'p50 ms':>9}  {'p90 ms':>9}  {'p99 ms':>9}"
)


def measure(
    analyzer: PerfAnalyzer, protocol: str, url: str, concurrency: int, requests: int, timeout: float
) -> Measurement:
    """Three windows of at least a second and `requests` requests each; all three count. Raises PerfError."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.csv")
        # What makes three windows the whole run: any three are called stable.
        windows = ["--max-trials=3", "--stability-percentage=999", "--measurement-mode=count_windows"]
        windows += [f"--measurement-request-count={requests}", "--measurement-interval=1000"]
        target = [*PROTOCOLS[protocol], "-u", url, f"--input-data={INPUTS}"]
        analyzer.run([*target, *windows, f"--concurrency-range={concurrency}", "-f", str(report)], timeout)
        row = next(csv.DictReader(report.read_text().splitlines()), None)
    if row is None:
        raise PerfError(f"perf_analyzer reported nothing at concurrency {concurrency} over {protocol}")
    requests_per_second = float(row["Inferences/Second"])
    p50, p90, p99 = (float(row[f"p{percent} latency"]) / 1000 for percent in (50, 90, 99))
    responses_per_second = float(row.get("Response Throughput", requests_per_second))  # of streams alone
    return Measurement(protocol, concurrency, requests_per_second, responses_per_second, p50, p90, p99)


def sweep(analyzer: PerfAnalyzer, server: Addresses, options: argparse.Namespace) -> Iterator[Measurement]:
    urls = {"http": server.http, "grpc": server.grpc, "stream": server.grpc}
    for protocol in (
        "http",
        "grpc",
    ):  # the first answer may pay for warming up; a broken server is reported here in a line
        with Client(urls[protocol], protocol, options.timeout) as client:
            client.generate("Once upon a time", max_tokens=2)
    for concurrency in options.concurrency:
        for protocol in PROTOCOLS:
            requests = concurrency * options.requests_per_client
            yield measure(analyzer, protocol, urls[protocol], concurrency, requests, options.timeout)


def write(result: Result, title: str, directory: Path) -> list[Path]:
    """Writes `perf.csv`, a line for each measurement, and `perf.png` into `directory`; returns both."""
    table, picture = directory / "perf.csv", directory / "perf.png"
    write_csv(result, table)
    lines = {
        name: [
            (each["concurrency"], each["p50_ms"], each["requests_per_second"])
            for each in result["measurements"]
            if each["protocol"] == protocol
        ]
        for protocol, name in NAMES.items()
    }
    draw(title, lines, picture)
    return [table, picture]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures answers, over HTTP and gRPC, and streams with perf_analyzer.",
        epilog="Further options of serve.py may follow after --; they are for the server that this starts.",
    )
    parser.add_argument(
        "--url", metavar="HOST:PORT", help="the HTTP endpoint of a running server (default: starts one)"
    )
    parser.add_argument(
        "--grpc-url", metavar="HOST:PORT", default="localhost:8001", help="with --url: its gRPC endpoint"
    )
    parser.add_argument(
        "--model", metavar="DIR_OR_HUB_ID", help="what serve.py is to serve (default: the embedded storyteller)"
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="DIR", help="for CSV and plot; default: build/perf"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="default: 1 4 16")
    parser.add_argument(
        "--requests-per-client", type=int, default=8, metavar="N", help="fewest in a window of three; default: 8"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="for each measurement; default: 120"
    )
    parser.add_argument("--quick", action="store_true", help="one request a client, concurrency 1 and 16")
    parser.add_argument("serve_arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.model:
        options.serve_arguments = ["--model", options.model, *options.serve_arguments]
    if options.url and options.serve_arguments:
        parser.error("--url names a running server; --model and what follows -- are for one that this starts")
    if options.quick:
        options.concurrency, options.requests_per_client = [1, 16], 1
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        with contextlib.ExitStack() as stack:
            analyzer = stack.enter_context(find_perf_analyzer())
            if options.url:
                server = Addresses(host_and_port(options.url), host_and_port(options.grpc_url))
            else:
                server = stack.enter_context(local_server(options.serve_arguments, LOADED_WITHIN))
            title = options.url or options.model or "storyteller, the embedded model"
            print(HEADING)
            measurements: list[Measurement] = []
            for measurement in sweep(analyzer, server, options):
                measurements.append(measurement)
                print(measurement, flush=True)
                # Each time, so that a sweep that is cut short keeps what it has.
                result = make_result("perf_analyzer", measurements, machine=processor())
                written = write(result, title, options.output)
    except (PerfError, ServerFailedError, ClientError, OSError) as error:
        print(f"perf.py: {error}", file=sys.stderr)
        return 1
    print("written:", *written)
    print(json.dumps(result))
    return 0
