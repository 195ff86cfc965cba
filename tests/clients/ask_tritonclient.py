# /// script
# dependencies = ["tritonclient[http,grpc]==2.73.0"]
# ///
"""tritonclient: HTTP, gRPC and both with asyncio; whole answers and streams."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
import tritonclient.http.aio as http_aio
from asked import DECOUPLED, MAX_TOKENS, PROMPT, PROMPTS, STOP_WORD, end, read_arguments, tell
from tritonclient.utils import np_to_triton_dtype

ARGUMENTS = read_arguments()
INFER = DECOUPLED if ARGUMENTS.model == ARGUMENTS.streaming_model else {}


def inputs(
    protocol: Any, prompts: list[str], max_tokens: int = MAX_TOKENS, stop_word: str = "", stream: bool = False
) -> list[Any]:
    arrays = {
        "text_input": np.array([[prompt.encode()] for prompt in prompts], np.object_),
        "max_tokens": np.array([[max_tokens]] * len(prompts), np.int32),
        "stream": np.array([[stream]] * len(prompts), np.bool_),
    }
    if stop_word:
        arrays["stop_words"] = np.array([[stop_word.encode()]] * len(prompts), np.object_)
    made = []
    for name, array in arrays.items():
        made.append(protocol.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        made[-1].set_data_from_numpy(array)
    return made


def texts(result: Any) -> list[str]:
    return [text.decode() for text in result.as_numpy("text_output").reshape(-1)]


def infer(protocol: Any, url: str, prompts: list[str], **fields: Any) -> list[str]:
    with protocol.InferenceServerClient(url) as client:
        return texts(client.infer(ARGUMENTS.model, inputs(protocol, prompts, **fields)))


def infer_aio(protocol: Any, synchronous: Any, url: str) -> str:
    async def ask() -> list[str]:
        async with protocol.InferenceServerClient(url) as client:
            return texts(await client.infer(ARGUMENTS.model, inputs(synchronous, [PROMPT])))

    return asyncio.run(ask())[0]


def stream(**fields: Any) -> Iterator[str]:
    arrived: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with grpc.InferenceServerClient(ARGUMENTS.grpc) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        asked = inputs(grpc, [PROMPT], stream=True, **fields)
        client.async_stream_infer(ARGUMENTS.streaming_model, asked, enable_empty_final_response=True)
        while True:
            result, error = arrived.get()
            if error:
                raise error
            if result.get_response().outputs:
                yield texts(result)[0]
            if result.get_response().parameters["triton_final_response"].bool_param:
                return


def stream_aio() -> list[str]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": ARGUMENTS.streaming_model,
            "inputs": inputs(grpc, [PROMPT], stream=True),
            "enable_empty_final_response": True,
        }

    async def ask() -> list[str]:
        pieces = []
        async with grpc_aio.InferenceServerClient(ARGUMENTS.grpc) as client:
            async for result, error in client.stream_infer(requests()):
                if error:
                    raise error
                if result.get_response().outputs:
                    pieces += texts(result)
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
        return pieces

    return asyncio.run(ask())


def tell_all(name: str, protocol: Any, url: str) -> None:
    tell(name, "whole", lambda: infer(protocol, url, [PROMPT])[0], **INFER)
    tell(name, "stop words", lambda: infer(protocol, url, [PROMPT], stop_word=STOP_WORD)[0], **INFER)
    tell(name, "several prompts", lambda: infer(protocol, url, PROMPTS), **INFER)
    tell(name, "error", lambda: infer(protocol, url, [PROMPT], max_tokens=0), **INFER)


tell_all("HTTP `infer`", http, ARGUMENTS.http)
tell_all("gRPC `infer`", grpc, ARGUMENTS.grpc)
tell("HTTP `infer`, asyncio", "whole", lambda: infer_aio(http_aio, http, ARGUMENTS.http), **INFER)
tell("gRPC `infer`, asyncio", "whole", lambda: infer_aio(grpc_aio, grpc, ARGUMENTS.grpc), **INFER)
tell("gRPC stream", "streamed", stream)
tell("gRPC stream", "stop words", lambda: stream(stop_word=STOP_WORD))
tell("gRPC stream", "error", lambda: stream(max_tokens=0))
tell("gRPC stream, asyncio", "streamed", lambda: iter(stream_aio()))
end()
