"""Many streams at once from `ensemble_stream` over HTTP, and what came of them: times, rates, memory.

One thread of asyncio (aiohttp) reads all streams, because the reader shares the machine with what it measures: it keeps
arrival times and bytes, and decodes them when all is over. Does not know how servers are started.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from gptj_triton.bench.machine import OtherPrograms, resident_mib, tree
from gptj_triton.bench.percentiles import Times, percentiles
from gptj_triton.bench.perf_inputs import shipped_prompts
from gptj_triton.client import STREAMING_MODEL
from gptj_triton.client.events import EventReader
from gptj_triton.triton.stubs import STUB

TRITON = ("tritonserver", STUB)
NAME_BYTES = 15  # of a process that the system keeps
RECEIVE_BUFFER = 4096  # bytes, so that the server has to keep what a reader leaves


class StreamFailedError(Exception):
    """A stream brought something else than what was asked for."""


@dataclass
class Stream:
    """What one request got: when it was sent, and the arrival and the bytes of each piece of its response."""

    started: float  # seconds, as are all times of arrival
    chunks: list[tuple[float, bytes]] = field(default_factory=list)

    def arrivals(self, max_tokens: int) -> list[tuple[float, int]]:
        """When each piece came and how many tokens it had. Raises StreamFailedError."""
        reader = EventReader()
        found: list[tuple[float, int]] = []  # arrival, tokens of the prompt and so far
        for arrived, chunk in self.chunks:
            for answer in reader.feed(chunk):
                if "error" in answer:
                    raise StreamFailedError(answer["error"])
                found.append((arrived, answer["sequence_length"]))
        if not found:
            raise StreamFailedError("a stream brought nothing")
        prompt = found[-1][1] - max_tokens
        lengths = [prompt, *(length for _, length in found)]
        return [(arrived, length - before) for (arrived, length), before in zip(found, lengths, strict=False)]


@dataclass(frozen=True)
class StreamMeasurement:
    """Of all streams of one run together. `other_cores`: how many cores other programs used meanwhile."""

    part: str
    streams: int
    max_tokens: int
    seconds: float
    tokens_per_second: float
    pieces_per_second: float
    first_token_ms: Times
    between_tokens_ms: Times  # tokens that came together share the time since the piece before
    between_pieces_ms: Times
    other_cores: float

    def __str__(self) -> str:
        times = (self.first_token_ms, self.between_tokens_ms, self.between_pieces_ms)
        columns = (" ".join(f"{each:>7.1f}" for each in percents) for percents in times)
        rates = f"{self.tokens_per_second:>9.0f} {self.pieces_per_second:>9.0f}"
        return f"{self.part:<20} {self.streams:>7}  {'  '.join(columns)} {rates} {self.other_cores:>7.2f}"


TIMES = "  ".join(f"{times:>23}" for times in ("first token, ms", "between tokens, ms", "between pieces, ms"))
HEADING = f"{'':<20} {'streams':>7}  {TIMES} {'tokens/s':>9} {'pieces/s':>9} {'others':>7}"


@dataclass(frozen=True)
class MemoryMeasurement:
    """Resident memory in MiB of tritonserver and its stubs while clients do not read what they are sent."""

    part: str
    readers: int
    before: float
    worst: float
    after: float

    def __str__(self) -> str:
        return (
            f"{self.part:<20} {self.readers} readers that stop: {self.before:.0f} MiB before, {self.worst:.0f} at the "
            f"worst, {self.after:.0f} after they left"
        )


def measure(
    part: str, url: str, streams: int, max_tokens: int, fields: dict[str, Any] | None = None
) -> StreamMeasurement:
    """All streams at once, from the first request to the last piece; `url` is HOST:PORT."""
    asyncio.run(_read_all(url, min(streams, 4), 2, fields or {}))  # what a first answer has to do once
    others = OtherPrograms()
    done = asyncio.run(_read_all(url, streams, max_tokens, fields or {}))
    other_cores = others.cores()
    arrivals = [stream.arrivals(max_tokens) for stream in done]
    seconds = max(pieces[-1][0] for pieces in arrivals) - min(stream.started for stream in done)
    gaps = [
        (later - earlier, tokens) for pieces in arrivals for (earlier, _), (later, tokens) in itertools.pairwise(pieces)
    ]
    return StreamMeasurement(
        part,
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


def measure_memory(part: str, url: str, pid: int, readers: int, max_tokens: int, seconds: float) -> MemoryMeasurement:
    """Of the server `pid`, around `readers` that stop after the first piece and stay for `seconds`."""
    asyncio.run(_read_all(url, readers, 8, {}))  # so that what so many streams need anyway is there before
    before = triton_mib(pid)
    worst = asyncio.run(_leave_unread(url, pid, readers, max_tokens, seconds))
    time.sleep(1)
    return MemoryMeasurement(part, readers, before, worst, triton_mib(pid))


def triton_mib(pid: int) -> float:
    """Resident memory of those descendants of a launcher that are Triton's own; the engine is none."""
    names = {name[:NAME_BYTES] for name in TRITON}
    found = []
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            if process.name()[:NAME_BYTES] in names:
                found.append(process)
    return resident_mib(found)


def _fields(index: int, max_tokens: int, more: dict[str, Any]) -> dict[str, Any]:
    texts = shipped_prompts()
    return {"text_input": texts[index % len(texts)], "max_tokens": max_tokens, "min_tokens": max_tokens, **more}


def _endpoint(url: str) -> str:
    return f"http://{url}/v2/models/{STREAMING_MODEL}/generate_stream"


async def _read(client: aiohttp.ClientSession, url: str, fields: dict[str, Any]) -> Stream:
    stream = Stream(time.perf_counter())
    async with client.post(_endpoint(url), json=fields) as response:
        async for chunk in response.content.iter_any():
            stream.chunks.append((time.perf_counter(), chunk))
    return stream


async def _read_all(url: str, streams: int, max_tokens: int, more: dict[str, Any]) -> list[Stream]:
    # A connection for each request: an idle one would hold up the server's end.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as client:
        reads = (_read(client, url, _fields(index, max_tokens, more)) for index in range(streams))
        return await asyncio.gather(*reads)


def _small_socket(address: Any) -> socket.socket:
    """A socket that holds little of what its owner does not read."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return made


async def _leave_unread(url: str, pid: int, readers: int, max_tokens: int, seconds: float) -> float:
    """The most memory seen while `readers` wait, each after its first bytes, until they leave after `seconds`."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=RECEIVE_BUFFER) as client:
        asked = [client.post(_endpoint(url), json=_fields(index, max_tokens, {})) for index in range(readers)]
        responses = await asyncio.gather(*asked)
        await asyncio.gather(*(response.content.readany() for response in responses))
        worst, leave = triton_mib(pid), time.monotonic() + seconds
        while time.monotonic() < leave:
            await asyncio.sleep(0.1)
            worst = max(worst, triton_mib(pid))
        for response in responses:
            response.close()
    return worst
