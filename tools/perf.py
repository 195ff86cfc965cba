"""Measures with Triton's own perf_analyzer, at several concurrencies, `make perf`: `ensemble` over HTTP and gRPC, and
`ensemble_stream` over gRPC.

perf_analyzer comes with the package tritonclient. The two libraries that it misses on most systems lie in the package
nvidia-pytriton under other names, and are lent to it from there. Knows nothing of how the server works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from client import MODEL, STREAMING_MODEL, Client, ClientError, host_and_port
from local_server import Addresses, ServerFailedError, local_server

INPUTS = Path(__file__).with_name("perf_inputs.json")
# What perf_analyzer is told for each way in; a stream's latency is until its last response.
WAYS = {
    "http": ["-m", MODEL, "-i", "http"],
    "grpc": ["-m", MODEL, "-i", "grpc"],
    "stream": ["-m", STREAMING_MODEL, "-i", "grpc", "--streaming", "--async"],
}
# The name that perf_analyzer asks for, and the pattern of the same library among nvidia-pytriton's files.
LENT_LIBRARIES = {
    "libb64.so.0d": "nvidia_pytriton.libs/libb64-*.so.0d",
    "libcudart.so.12": "nvidia_pytriton.libs/libcudart-*.so.12*",
}


class PerfError(Exception):
    """No measurement could be made; the message says why in one line."""


@dataclass(frozen=True)
class Measurement:
    """What perf_analyzer saw at one concurrency; `protocol` is one of WAYS."""

    protocol: str
    concurrency: int
    requests_per_second: float
    responses_per_second: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class PerfAnalyzer:
    """The program and the environment in which its libraries are found."""

    program: str
    environment: dict[str, str]

    def run(self, arguments: list[str], timeout: float) -> None:
        """Runs it for at most `timeout` seconds. Raises PerfError with its own words when it fails."""
        command = [self.program, *arguments]
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise PerfError(f"perf_analyzer did not finish within {timeout:g} s: {' '.join(arguments)}") from None
        if done.returncode:
            words = " ".join(done.stderr.split("Usage:")[0].split())  # its usage follows some errors
            raise PerfError(f"perf_analyzer ended with status {done.returncode}: {words}")

    def measure(self, protocol: str, url: str, concurrency: int, requests: int, timeout: float) -> Measurement:
        """Three windows of at least a second and `requests` requests each; all three count."""
        with tempfile.TemporaryDirectory() as directory:
            report = Path(directory, "report.csv")
            # What makes three windows the whole run: any three are called stable.
            windows = ["--max-trials=3", "--stability-percentage=999", "--measurement-mode=count_windows"]
            windows += [f"--measurement-request-count={requests}", "--measurement-interval=1000"]
            target = [*WAYS[protocol], "-u", url, f"--input-data={INPUTS}"]
            self.run([*target, *windows, f"--concurrency-range={concurrency}", "-f", str(report)], timeout)
            row = next(csv.DictReader(report.read_text().splitlines()), None)
        if row is None:
            raise PerfError(f"perf_analyzer reported nothing at concurrency {concurrency} over {protocol}")
        requests_per_second = float(row["Inferences/Second"])
        return Measurement(
            protocol,
            concurrency,
            requests_per_second,
            responses_per_second=float(row.get("Response Throughput", requests_per_second)),  # of streams alone
            p50_ms=float(row["p50 latency"]) / 1000,
            p99_ms=float(row["p99 latency"]) / 1000,
        )


@contextlib.contextmanager
def perf_analyzer(search_path: str | None = None) -> Iterator[PerfAnalyzer]:
    """perf_analyzer, shown to run; looked for beside this Python and on PATH, or on `search_path` alone.

    Raises PerfError when it is not there or a library is missing."""
    if search_path is None:
        search_path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    program = shutil.which("perf_analyzer", path=search_path)
    if program is None:
        raise PerfError("perf_analyzer not found: it comes with tritonclient 2.51 (later wheels carry none)")
    with tempfile.TemporaryDirectory() as directory:
        for name, found in lent_libraries().items():
            Path(directory, name).symlink_to(found)
        path = os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), directory]))
        analyzer = PerfAnalyzer(program, os.environ | {"LD_LIBRARY_PATH": path})
        try:
            analyzer.run(["--version"], timeout=60)
        except PerfError as error:
            raise PerfError(
                f"{error} (libb64.so.0d is in Debian's libb64-0d, libcudart.so.12 in PyPI's nvidia-cuda-runtime-cu12)"
            ) from None
        yield analyzer


def lent_libraries() -> dict[str, Path]:
    """Those of `LENT_LIBRARIES` that nvidia-pytriton holds, by the name perf_analyzer asks for."""
    try:
        files = importlib.metadata.files("nvidia-pytriton") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        name: Path(str(file.locate())).resolve()
        for name, pattern in LENT_LIBRARIES.items()
        for file in files
        if file.match(pattern)
    }


def sweep(analyzer: PerfAnalyzer, server: Addresses, options: argparse.Namespace) -> Iterator[Measurement]:
    urls = {"http": server.http, "grpc": server.grpc, "stream": server.grpc}
    for protocol in ("http", "grpc"):  # the first answer may pay for warming up; a broken server is told here in a line
        with Client(urls[protocol], protocol, options.timeout) as client:
            client.generate("Once upon a time", max_tokens=2)
    for concurrency in options.concurrency:
        for protocol in WAYS:
            requests = concurrency * options.requests_per_client
            yield analyzer.measure(protocol, urls[protocol], concurrency, requests, options.timeout)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures answers, over HTTP and gRPC, and streams with perf_analyzer."
    )
    parser.add_argument("--url", metavar="HOST:PORT", help="a running server's HTTP door (default: starts a server)")
    parser.add_argument("--grpc-url", metavar="HOST:PORT", default="localhost:8001", help="with --url: its gRPC door")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="default: 1 4 16")
    parser.add_argument(
        "--requests-per-client", type=int, default=8, metavar="N", help="fewest in a window of three; default: 8"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="for each measurement; default: 120"
    )
    parser.add_argument("--quick", action="store_true", help="one request a client, concurrency 1 and 16")
    options = parser.parse_args(arguments)
    if options.quick:
        options.concurrency, options.requests_per_client = [1, 16], 1
    return options


def main() -> int:
    options = parse_arguments()
    try:
        with contextlib.ExitStack() as stack:
            analyzer = stack.enter_context(perf_analyzer())
            if options.url:
                server = Addresses(host_and_port(options.url), host_and_port(options.grpc_url))
            else:
                server = stack.enter_context(local_server())
            columns = f"{'requests/s':>10}  {'responses/s':>11}  {'p50 ms':>9}  {'p99 ms':>9}"
            print(f"{'concurrency':>11}  {'protocol':<8}  {columns}")
            results = []
            for result in sweep(analyzer, server, options):
                results.append(result)
                print(
                    f"{result.concurrency:>11}  {result.protocol:<8}  {result.requests_per_second:>10.2f}"
                    f"  {result.responses_per_second:>11.2f}  {result.p50_ms:>9.1f}  {result.p99_ms:>9.1f}",
                    flush=True,
                )
    except (PerfError, ServerFailedError, ClientError) as error:
        print(f"perf.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"benchmark": "perf_analyzer", "results": [dataclasses.asdict(result) for result in results]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
