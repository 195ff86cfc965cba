"""Measures `ensemble_stream` on servers of its own: how soon text comes, how much, and what slow readers cost.

    latency  the real engine: time to the first token and between tokens, at several numbers of streams
    pieces   an engine that computes nothing, the pace of pieces lifted: how many pieces a second Triton carries
    tokens   the same engine, faster, at the committed pace: what tokens that travel together make of that
    memory   readers of that which stop after the first piece: resident memory of Triton before, at the worst and after

One thread of asyncio (aiohttp) reads all streams over HTTP, because the reader shares the machine with what it
measures: it keeps arrival times and bytes, and looks at them when all is over. The times of streams are in
milliseconds; p99 of a few streams is their worst.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import psutil

from gptj_triton.bench.fake_server import server_of_fakes
from gptj_triton.bench.local_server import ServerFailedError, local_server
from gptj_triton.bench.machine import OtherPrograms, processor
from gptj_triton.bench.perf_inputs import shipped_prompts
from gptj_triton.client import STREAMING_MODEL

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
TRITON = ("tritonserver", "triton_python_backend_stub")
RECEIVE_BUFFER = 4096  # bytes, so that what a reader leaves is the server's to keep


class StreamFailedError(Exception):
    """A stream brought something else than what was asked for."""


@dataclass
class Stream:
    """What one request got: when it was sent, and the arrival and the bytes of each piece of its response."""

    started: float  # seconds, as are all times of arrival
    chunks: list[tuple[float, bytes]] = field(default_factory=list)

    def arrivals(self, max_tokens: int) -> list[tuple[float, int]]:
        """When each piece came and how many tokens it had. Raises StreamFailedError."""
        found: list[tuple[float, int]] = []
        rest = b""
        for arrived, chunk in self.chunks:
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                answer = json.loads(event.removeprefix(b"data: "))
                if "error" in answer:
                    raise StreamFailedError(answer["error"])
                found.append((arrived, answer["sequence_length"]))
        if not found:
            raise StreamFailedError("a stream brought nothing")
        known = found[-1][1] - max_tokens  # the prompt's
        return [
            (arrived, length - before)
            for (arrived, length), before in zip(found, [known, *(length for _, length in found)], strict=False)
        ]


@dataclass(frozen=True)
class Result:
    """Of all streams of one run together. `other_cores`: how many cores other programs used meanwhile."""

    streams: int
    max_tokens: int
    seconds: float
    tokens_per_second: float
    pieces_per_second: float
    first_token_ms: tuple[float, float]  # p50, p99, as the others are
    between_tokens_ms: tuple[float, float]  # tokens that came together share the time since the piece before
    between_pieces_ms: tuple[float, float]
    other_cores: float


@dataclass(frozen=True)
class Memory:
    """Resident memory of tritonserver and its stubs in MiB."""

    readers: int
    before: float
    worst: float
    after: float


def fields_of(index: int, max_tokens: int, more: dict[str, Any]) -> dict[str, Any]:
    texts = shipped_prompts()
    return {"text_input": texts[index % len(texts)], "max_tokens": max_tokens, "min_tokens": max_tokens, **more}


def session() -> aiohttp.ClientSession:
    """A connection for each request. An idle one would hold up the server's end."""
    timeout = aiohttp.ClientTimeout(total=300)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout)


async def read(client: aiohttp.ClientSession, url: str, fields: dict[str, Any]) -> Stream:
    stream = Stream(time.perf_counter())
    async with client.post(f"http://{url}/v2/models/{STREAMING_MODEL}/generate_stream", json=fields) as response:
        async for chunk in response.content.iter_any():
            stream.chunks.append((time.perf_counter(), chunk))
    return stream


async def read_all(url: str, streams: int, max_tokens: int, more: dict[str, Any]) -> list[Stream]:
    async with session() as client:
        reads = (read(client, url, fields_of(index, max_tokens, more)) for index in range(streams))
        return await asyncio.gather(*reads)


def measure(url: str, streams: int, max_tokens: int, more: dict[str, Any] | None = None) -> Result:
    """All streams at once, from the first request to the last piece."""
    asyncio.run(read_all(url, min(streams, 4), 2, more or {}))  # what a first answer has to do once
    others = OtherPrograms()
    done = asyncio.run(read_all(url, streams, max_tokens, more or {}))
    other_cores = others.cores()
    arrivals = [stream.arrivals(max_tokens) for stream in done]
    began = min(stream.started for stream in done)
    seconds = max(pieces[-1][0] for pieces in arrivals) - began
    gaps = [
        (later - earlier, tokens) for pieces in arrivals for (earlier, _), (later, tokens) in itertools.pairwise(pieces)
    ]
    return Result(
        streams,
        max_tokens,
        seconds,
        tokens_per_second=streams * max_tokens / seconds,
        pieces_per_second=sum(map(len, arrivals)) / seconds,
        first_token_ms=percentiles(
            [pieces[0][0] - stream.started for pieces, stream in zip(arrivals, done, strict=True)]
        ),
        between_tokens_ms=percentiles([gap / tokens for gap, tokens in gaps for _ in range(tokens)]),
        between_pieces_ms=percentiles([gap for gap, _ in gaps]),
        other_cores=other_cores,
    )


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds; zeros where there is nothing."""
    p50, p99 = 1000 * np.percentile(seconds or [0.0], [50, 99])
    return float(p50), float(p99)


def resident_mib() -> float:
    """Of the servers that this program has started. Pages that several processes share count for each."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() in TRITON or process.name() in (name[:15] for name in TRITON):
                total += process.memory_info().rss
    return total / (1 << 20)


def small_socket(address: Any) -> socket.socket:
    """A socket that holds little of what its owner does not read."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return made


async def leave_unread(url: str, readers: int, max_tokens: int, seconds: float) -> float:
    """The most memory seen while `readers` wait, each after its first bytes, until they leave after `seconds`."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=small_socket)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=RECEIVE_BUFFER) as client:
        target = f"http://{url}/v2/models/{STREAMING_MODEL}/generate_stream"
        asked = [client.post(target, json=fields_of(index, max_tokens, {})) for index in range(readers)]
        responses = await asyncio.gather(*asked)
        await asyncio.gather(*(response.content.readany() for response in responses))
        worst, leave = resident_mib(), time.monotonic() + seconds
        while time.monotonic() < leave:
            await asyncio.sleep(0.1)
            worst = max(worst, resident_mib())
        for response in responses:
            response.close()
    return worst


def measure_memory(url: str, readers: int, max_tokens: int, seconds: float) -> Memory:
    """Around readers that stop; `seconds` is for how long they stay."""
    asyncio.run(read_all(url, readers, 8, {}))  # so that what so many streams need anyway is there before
    before = resident_mib()
    worst = asyncio.run(leave_unread(url, readers, max_tokens, seconds))
    time.sleep(1)
    return Memory(readers, before, worst, resident_mib())


def run(options: argparse.Namespace) -> Iterator[tuple[str, Result | Memory]]:
    """Each measurement with its name, part after part."""
    if "latency" in options.parts:
        with local_server(options.serve_arguments) as server:
            for streams in options.streams:
                yield "latency", measure(server.http, streams, options.max_tokens)
    most = max(options.streams)
    if "pieces" in options.parts:
        with server_of_fakes(PIECES_STEP_MS, [f"--stream-pieces-per-second={LIFTED}"]) as server:
            yield "pieces", measure(server.http, most, options.max_tokens)
            yield "pieces, every field", measure(server.http, most, options.max_tokens, EVERY_FIELD)
    if "tokens" in options.parts or "memory" in options.parts:
        with server_of_fakes(TOKENS_STEP_MS) as server:
            if "tokens" in options.parts:
                yield "tokens", measure(server.http, most, 8 * options.max_tokens)
            if "memory" in options.parts:
                yield "memory", measure_memory(server.http, options.readers, options.unread_tokens, options.unread_s)


def line_of(name: str, result: Result | Memory) -> str:
    if isinstance(result, Memory):
        return (
            f"{name:<20} {result.readers} readers that stop: {result.before:.0f} MiB before, {result.worst:.0f} at the "
            f"worst, {result.after:.0f} after they left"
        )
    times = (
        f"{p50:>7.1f} {p99:>7.1f}"
        for p50, p99 in (result.first_token_ms, result.between_tokens_ms, result.between_pieces_ms)
    )
    rates = f"{result.tokens_per_second:>9.0f} {result.pieces_per_second:>9.0f}"
    return f"{name:<20} {result.streams:>7}  {'  '.join(times)} {rates} {result.other_cores:>7.2f}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures streams through servers of its own, with the real engine and with one that computes "
        "nothing.",
        epilog="Options of serve.py may stand behind --; they are for the server with the real engine.",
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
        times = "first token ms   betw. tokens ms  betw. pieces ms"
        print(f"{processor()}; p50 and p99 of times; others: cores that other programs used")
        print(f"{'':<20} {'streams':>7}  {times}  {'tokens/s':>8} {'pieces/s':>9} {'others':>7}")
    results = []
    try:
        for name, result in run(options):
            results.append({"part": name, **dataclasses.asdict(result)})
            if not options.json:
                print(line_of(name, result), flush=True)
    except (ServerFailedError, StreamFailedError, aiohttp.ClientError) as error:
        print(f"benchmark_streaming.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"benchmark": "streaming", "processor": processor(), "results": results}))
    return 0
