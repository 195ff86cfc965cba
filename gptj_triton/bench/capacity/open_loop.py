"""Requests to a real server at given moments, whatever becomes of those before: an open loop of streams over HTTP.

One thread of asyncio (aiohttp) does it, since it shares the machine with the server: bytes are decoded when all is
over.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import aiohttp
from tokenizers import Tokenizer

from gptj_triton.bench.capacity.replica import Arrival, Served
from gptj_triton.bench.streams import Stream, StreamFailedError
from gptj_triton.client import STREAMING_MODEL
from gptj_triton.project import EMBEDDED_MODEL

LONGEST = 600.0  # seconds for a request


class Texts:
    """Prompts of a wanted number of tokens for the embedded model: words that are one token each, drawn by chance, so
    that no two begin alike."""

    def __init__(self, seed: int) -> None:
        tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
        words = (tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size()))
        self._words = [word for word in words if word[:1] == " " and word[1:].isalpha() and word[1:].islower()]
        self._chance = random.Random(f"texts {seed}")

    def of(self, tokens: int) -> str:
        return "".join(self._chance.choices(self._words, k=tokens))


async def _send(client: aiohttp.ClientSession, url: str, text: str, output: int) -> Stream:
    stream = Stream(time.perf_counter())
    fields = {"text_input": text, "max_tokens": output, "min_tokens": output}
    async with client.post(f"http://{url}/v2/models/{STREAMING_MODEL}/generate_stream", json=fields) as response:
        async for chunk in response.content.iter_any():
            stream.chunks.append((time.perf_counter(), chunk))
    return stream


def _session() -> aiohttp.ClientSession:
    # A connection for each request: an idle one would hold up the server's end.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=LONGEST))


async def _open_loop(url: str, arrivals: Sequence[Arrival], texts: Sequence[str]) -> list[Stream]:
    async with _session() as client:
        began, sent = time.perf_counter() + 0.1, []
        for arrival, text in zip(arrivals, texts, strict=True):
            await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
            sent.append(asyncio.ensure_future(_send(client, url, text, arrival.output)))
        streams = await asyncio.gather(*sent)
        for stream, arrival in zip(streams, arrivals, strict=True):
            stream.started = began + arrival.at  # a request that was sent late has waited since then
        return list(streams)


def open_loop(url: str, arrivals: Sequence[Arrival], texts: Texts) -> list[Served]:
    """Sends each request at its moment; `url` is HOST:PORT."""
    streams = asyncio.run(_open_loop(url, arrivals, [texts.of(arrival.prompt) for arrival in arrivals]))
    return [_served(stream, arrival) for stream, arrival in zip(streams, arrivals, strict=True)]


def _served(stream: Stream, arrival: Arrival) -> Served:
    """The tokens' moments after that of the first arrival; tokens that came together share the time since the piece
    before."""
    try:
        pieces = stream.arrivals(arrival.output)
    except StreamFailedError:
        return Served(arrival)
    tokens: list[float] = []
    before = pieces[0][0]
    for moment, count in pieces:
        tokens += [before + (moment - before) * (index + 1) / count for index in range(count)]
        before = moment
    return Served(arrival, [arrival.at + moment - stream.started for moment in tokens])


async def _closed_loop(url: str, clients: int, seconds: float, work: Sequence[tuple[Arrival, str]]) -> list[Served]:
    until, next_one, done = time.perf_counter() + seconds, iter(work), []

    async def one_after_another(client: aiohttp.ClientSession) -> None:
        while time.perf_counter() < until and (asked := next(next_one, None)) is not None:
            arrival, text = asked
            done.append(_served(await _send(client, url, text, arrival.output), arrival))

    async with _session() as client:
        await asyncio.gather(*(one_after_another(client) for _ in range(clients)))
    return done


def closed_loop(url: str, clients: int, seconds: float, arrivals: Sequence[Arrival], texts: Texts) -> list[Served]:
    """So many clients for so long, each with one request after another, as far as `arrivals` reach; their own moments
    mean nothing."""
    work = [(arrival, texts.of(arrival.prompt)) for arrival in arrivals]
    return asyncio.run(_closed_loop(url, clients, seconds, work))
