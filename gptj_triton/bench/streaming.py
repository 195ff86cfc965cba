"""Measures `ensemble_stream` on servers of its own: how soon text comes, how much, and what slow readers cost.

    latency  the real engine: time to the first token and between tokens, at several numbers of streams
    pieces   an engine that computes nothing, the pace of pieces lifted: how many pieces a second Triton carries
    tokens   the same engine, faster, at the committed pace: what tokens that travel together make of that
    memory   readers of that which stop after the first piece: resident memory of Triton before, at the worst and after

Times are in milliseconds; p99 of a few streams is their worst. Knows how servers are started, not how streams are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import aiohttp

from gptj_triton.bench.fake_server import server_of_fakes
from gptj_triton.bench.local_server import ServerFailedError, local_server
from gptj_triton.bench.machine import processor
from gptj_triton.bench.results import make_result
from gptj_triton.bench.streams import (
    HEADING,
    MemoryMeasurement,
    StreamFailedError,
    StreamMeasurement,
    measure,
    measure_memory,
)

PARTS = ("latency", "pieces", "tokens", "memory")
LIFTED = 1_000_000  # pieces a second: none waits
PIECES_STEP_MS, TOKENS_STEP_MS = 20.0, 2.0
# All that a request can ask for, so that a piece carries every tensor that is declared.
EVERY_FIELD: dict[str, Any] = {
    "stop_words": ["\0"],
    "return_log_probs": True,
    "exclude_input_in_output": False,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}


def run(options: argparse.Namespace) -> Iterator[StreamMeasurement | MemoryMeasurement]:
    """Each measurement, part after part."""
    if "latency" in options.parts:
        with local_server(options.serve_arguments) as server:
            for streams in options.streams:
                yield measure("latency", server.http, streams, options.max_tokens)
    most = max(options.streams)
    if "pieces" in options.parts:
        with server_of_fakes(PIECES_STEP_MS, [f"--stream-pieces-per-second={LIFTED}"]) as server:
            yield measure("pieces", server.http, most, options.max_tokens)
            yield measure("pieces, every field", server.http, most, options.max_tokens, EVERY_FIELD)
    if "tokens" in options.parts or "memory" in options.parts:
        with server_of_fakes(TOKENS_STEP_MS) as server:
            if "tokens" in options.parts:
                yield measure("tokens", server.http, most, 8 * options.max_tokens)
            if "memory" in options.parts:
                readers, tokens, seconds = options.readers, options.unread_tokens, options.unread_s
                yield measure_memory("memory", server.http, server.pid, readers, tokens, seconds)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures streams through servers of its own, with the real engine and with one that computes "
        "nothing.",
        epilog="Options of serve.py may follow after --; they are for the server with the real engine.",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="default: 1 16 64")
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N", help="of each stream; default: 100")
    parser.add_argument("--readers", type=int, default=32, metavar="N", help="that stop; default: 32")
    parser.add_argument("--json", action="store_true", help="print the results as one line of JSON alone")
    parser.add_argument("--quick", action="store_true", help="one server and few tokens: only shows that it works")
    parser.add_argument("serve_arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.unread_tokens, options.unread_s = 900, 6.0
    if options.quick:
        options.parts, options.streams, options.max_tokens, options.unread_s = ["tokens", "memory"], [4], 4, 2.5
    if min(options.max_tokens, options.readers, *options.streams) < 1:
        parser.error("--streams, --max-tokens and --readers must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not options.json:
        print(f"{processor()}; times are p50 / p90 / p99; others: cores that other programs used")
        print(HEADING)
    measurements = []
    try:
        for measurement in run(options):
            measurements.append(measurement)
            if not options.json:
                print(measurement, flush=True)
    except (ServerFailedError, StreamFailedError, aiohttp.ClientError) as error:
        print(f"benchmark_streaming.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(make_result("streaming", measurements, machine=processor())))
    return 0
