"""Sends single requests to a server over HTTP and gRPC and says how each ended. For one event loop.

Each HTTP request has a connection of its own, so that nobody sends it a second time. Knows Triton's endpoints, not what
the requests are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import aiohttp
import grpc.aio
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from gptj_triton.bench.holding.outcomes import Ended, Outcome, StreamEnd, of_grpc, of_http
from gptj_triton.bench.local_server import Addresses
from gptj_triton.client import MODEL, STREAMING_MODEL

PATIENCE = 60.0  # seconds after which a request counts as hanging
TYPES = {"text_input": np.object_, "stop_words": np.object_, "bad_words": np.object_}  # of fields; others are INT32
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
FLAGS = ("stream", "return_log_probs")


def tensors(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of fields, the same in each, as arrays [B, 1] of the ensembles' types."""
    found = {}
    for name in rows[0]:
        kind: Any = TYPES.get(name, np.float32 if name in FLOATS else np.bool_ if name in FLAGS else np.int32)
        found[name] = np.array([[row[name]] for row in rows], np.uint64 if name == "seed" else kind)
    return found


class Asker:
    """A client of one server, or of a proxy. Use it in `async with`.

    Over HTTP it speaks TLS where there is `tls`, sends from the IP address `sender`, if given, and each time `headers`.
    """

    def __init__(
        self,
        server: Addresses,
        patience: float = PATIENCE,
        tls: ssl.SSLContext | None = None,
        sender: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._server, self._patience = server, patience
        self._url = f"{'https' if tls else 'http'}://{server.http}/v2"
        self._tls, self._sender, self._headers = tls, sender, headers

    async def __aenter__(self) -> Asker:
        sender = (self._sender, 0) if self._sender else None
        connector = aiohttp.TCPConnector(limit=0, force_close=True, local_addr=sender, ssl=self._tls or True)
        no_limit = aiohttp.ClientTimeout(total=None)
        self._http = aiohttp.ClientSession(connector=connector, timeout=no_limit, headers=self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()
        if "_grpc" in vars(self):
            await self._grpc.close()

    @functools.cached_property
    def _grpc(self) -> triton.InferenceServerClient:
        # Without this a channel that failed to connect once waits up to two minutes before it tries again.
        reconnect = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
        return triton.InferenceServerClient(self._server.grpc, channel_args=reconnect)

    @property
    def grpc_stub(self) -> Any:
        """For messages that tritonclient would not send."""
        return self._grpc._client_stub

    async def post(self, path: str, body: Any, leave_after: float | None = None, **options: Any) -> Ended:
        """POST to /v2/PATH; `body` is JSON or, as bytes, anything. Leaves after so many seconds, if given."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def send() -> Ended:
            async with self._http.post(f"{self._url}/{path}", data=data, **options) as response:
                ended = of_http(response.status, await response.read())
                return replace(ended, retry_after=retry_after(response.headers))

        return await self.end(send(), leave_after)

    async def generate(self, model: str = MODEL, leave_after: float | None = None, **fields: Any) -> Ended:
        return await self.post(f"models/{model}/generate", fields, leave_after)

    async def stream(self, model: str = STREAMING_MODEL, leave_after_events: int | None = None, **fields: Any) -> Ended:
        """A stream of events; the client leaves after so many, if that is given."""

        async def send() -> Ended:
            url = f"{self._url}/models/{model}/generate_stream"
            async with self._http.post(url, json=fields) as response:
                end = StreamEnd(response.status)
                try:
                    async for chunk in response.content.iter_any():
                        end.feed(chunk)
                        if leave_after_events is not None and end.events >= leave_after_events:
                            return Ended(Outcome.LEFT)
                except aiohttp.ClientPayloadError as error:
                    return end.cut(f"{type(error).__name__} {error}")
                return replace(end.ended(), retry_after=retry_after(response.headers))

        return await self.end(send())

    async def infer(self, rows: Sequence[dict[str, Any]], model: str = MODEL, **more: Any) -> Ended:
        """`infer` over HTTP, with a row for each prompt."""
        inputs = [
            {"name": name, "shape": array.shape, "datatype": np_to_triton_dtype(array.dtype), "data": array.tolist()}
            for name, array in tensors(rows).items()
        ]
        return await self.post(f"models/{model}/infer", {"inputs": inputs, **more})

    async def grpc(
        self, rows: Sequence[dict[str, Any]], model: str = MODEL, leave_after: float | None = None, **more: Any
    ) -> Ended:
        """`ModelInfer`, with a row for each prompt."""
        return await self.grpc_infer(model, tensors(rows), leave_after, **more)

    async def grpc_infer(
        self, model: str, arrays: dict[str, np.ndarray[Any, Any]], leave_after: float | None = None, **more: Any
    ) -> Ended:
        async def send() -> Ended:
            await self._grpc.infer(model, grpc_inputs(arrays), **more)
            return Ended(Outcome.ANSWERED)

        return await self.end(send(), leave_after)

    async def grpc_stream(
        self, rows: Sequence[dict[str, Any]], model: str = STREAMING_MODEL, leave_after_events: int | None = None
    ) -> Ended:
        """`ModelStreamInfer` with one request; the client leaves after so many responses, if that is given."""

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model, "inputs": grpc_inputs(tensors(rows)), "enable_empty_final_response": True}

        async def send() -> Ended:
            responses = self._grpc.stream_infer(requests())
            events = 0
            async for result, error in responses:
                if error is not None:
                    return of_grpc(str(error.status() or "INVALID_ARGUMENT"), error.message())
                events += 1
                final = result.get_response().parameters.get("triton_final_response")
                if final is not None and final.bool_param:
                    return Ended(Outcome.ANSWERED)
                if leave_after_events is not None and events >= leave_after_events:
                    responses.cancel()
                    return Ended(Outcome.LEFT)
            return Ended(Outcome.CUT, "a stream without its last response")

        return await self.end(send())

    async def status(self, path: str, method: str = "GET", **options: Any) -> int:
        """The status of a request for /v2/PATH; 0 where none came within a second."""
        url, seconds = f"{self._url}/{path}", aiohttp.ClientTimeout(total=1.0)
        with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
            async with self._http.request(method, url, timeout=seconds, **options) as response:
                return response.status
        return 0

    async def end(self, send: Coroutine[Any, Any, Ended], leave_after: float | None = None) -> Ended:
        """Waits for the end of a request and adds the time that it took."""
        started = time.monotonic()
        try:
            ended = await asyncio.wait_for(send, min(self._patience, leave_after or self._patience))
        except (asyncio.TimeoutError, TimeoutError):
            ended = Ended(Outcome.HUNG, "no end") if leave_after is None else Ended(Outcome.LEFT)
        except InferenceServerException as error:
            ended = of_grpc(str(error.status()), error.message())
        except grpc.aio.AioRpcError as error:
            ended = of_grpc(str(error.code()), error.details() or "")
        except (aiohttp.ClientError, OSError) as error:
            ended = Ended(Outcome.CUT, f"{type(error).__name__} {error}".strip())
        return replace(ended, seconds=time.monotonic() - started)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that `Retry-After` tells to wait; 0 where it does not say, or names a date."""
    text = headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0


def grpc_inputs(arrays: dict[str, np.ndarray[Any, Any]]) -> list[Any]:
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return inputs
