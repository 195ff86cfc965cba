"""One HTTP request as bytes on a connection of its own, for bodies and heads that no HTTP client sends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from gptj_triton.bench.holding.outcomes import Ended, Outcome, of_http

SLICE = 1 << 16  # bytes that are written at once


async def post_raw(
    address: str, path: str, body: bytes, headers: Mapping[str, str], chunk_bytes: int, patience: float
) -> Ended:
    """POST /v2/PATH to HOST:PORT, in chunks of `chunk_bytes` unless 0; waits for `patience` seconds."""
    started = time.monotonic()
    try:
        ended = await asyncio.wait_for(_exchange(address, path, body, headers, chunk_bytes), patience)
    except asyncio.TimeoutError:
        ended = Ended(Outcome.HUNG, "no end")
    except OSError as error:
        ended = Ended(Outcome.CUT, f"{type(error).__name__} {error}")
    return replace(ended, seconds=time.monotonic() - started)


async def _exchange(address: str, path: str, body: bytes, headers: Mapping[str, str], chunk_bytes: int) -> Ended:
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        length = {"Transfer-Encoding": "chunked"} if chunk_bytes else {"Content-Length": str(len(body))}
        lines = [
            f"{name}: {value}" for name, value in {"Host": host, "Connection": "close", **length, **headers}.items()
        ]
        writer.write("\r\n".join([f"POST /v2/{path} HTTP/1.1", *lines, "\r\n"]).encode())
        with contextlib.suppress(ConnectionError):  # an early refusal can be read none the less
            for part in _slices(body, chunk_bytes):
                writer.write(part)
                await writer.drain()
        answer = await reader.read()
    finally:
        writer.close()
    return of_bytes(answer) if answer else Ended(Outcome.CUT, "no answer")


def _slices(body: bytes, chunk_bytes: int) -> Iterator[bytes]:
    if chunk_bytes:
        chunks = (body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes))
        body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    for start in range(0, len(body), SLICE):
        yield body[start : start + SLICE]


def of_bytes(answer: bytes) -> Ended:
    """The end of a request by the bytes that came until the connection was closed."""

    class Received:
        """What `HTTPResponse` takes for a socket."""

        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(answer)

    response = http.client.HTTPResponse(Received())  # type: ignore[arg-type]
    try:
        response.begin()
        return of_http(response.status, response.read())
    except http.client.IncompleteRead:
        return Ended(Outcome.CUT, "an answer without its end")
    except http.client.HTTPException as error:
        return Ended(Outcome.MALFORMED, f"{type(error).__name__} {answer[:80]!r}")
