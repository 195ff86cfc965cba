# /// script
# dependencies = ["kserve==0.21.0"]
# ///
"""KServe's clients of the Open Inference Protocol, REST and gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from asked import DECOUPLED, MAX_TOKENS, PROMPT, PROMPTS, STOP_WORD, end, read_arguments, tell
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

ARGUMENTS = read_arguments()
INFER = DECOUPLED if ARGUMENTS.model == ARGUMENTS.streaming_model else {}


def request(prompts: list[str], max_tokens: int = MAX_TOKENS, stop_word: str = "") -> InferRequest:
    rows = len(prompts)
    inputs = [InferInput("text_input", [rows, 1], "BYTES"), InferInput("max_tokens", [rows, 1], "INT32")]
    inputs[0].set_data_from_numpy(np.array([[prompt.encode()] for prompt in prompts], np.object_), binary_data=False)
    inputs[1].set_data_from_numpy(np.array([[max_tokens]] * rows, np.int32), binary_data=False)
    if stop_word:
        inputs.append(InferInput("stop_words", [rows, 1], "BYTES"))
        words = np.array([[stop_word.encode()]] * rows, np.object_)
        inputs[2].set_data_from_numpy(words, binary_data=False)
    return InferRequest(ARGUMENTS.model, inputs)


async def rest(asked: InferRequest) -> Any:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    return await client.infer(f"http://{ARGUMENTS.http}", asked, model_name=ARGUMENTS.model)


async def grpc(asked: InferRequest) -> Any:
    async with InferenceGRPCClient(ARGUMENTS.grpc) as client:
        return await client.infer(asked)


def texts(way: Any, prompts: list[str], **fields: Any) -> list[str]:
    response = asyncio.run(way(request(prompts, **fields)))
    output = next(each for each in response.outputs if each.name == "text_output")
    return [text.decode() if isinstance(text, bytes) else text for text in output.as_numpy().reshape(-1)]


def tell_all(name: str, way: Any, **known: str) -> None:
    tell(name, "whole", lambda: texts(way, [PROMPT])[0], **known)
    tell(name, "stop words", lambda: texts(way, [PROMPT], stop_word=STOP_WORD)[0], **known)
    tell(name, "several prompts", lambda: texts(way, PROMPTS), **known)
    tell(name, "error", lambda: texts(way, [PROMPT], max_tokens=0), **known)


# Of an error it keeps the status and not the words.
tell_all("REST `infer`", rest, **(INFER and {**INFER, "refused": "501"}))
tell_all("gRPC `infer`", grpc, **INFER)
end()
