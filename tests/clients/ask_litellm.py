# /// script
# dependencies = ["litellm==1.110.2"]
# ///
"""LiteLLM, provider `triton`: `generate`, its streams, and `infer`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from asked import DECOUPLED, MAX_TOKENS, PROMPT, STOP_WORD, end, read_arguments, tell

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for prices
import litellm

ARGUMENTS = read_arguments()
INFER = {"refused": "unexpected shape", "why": "it sends tensors without the batch's dimension"}
if ARGUMENTS.model == ARGUMENTS.streaming_model:
    INFER = DECOUPLED
MESSAGES = [{"role": "user", "content": PROMPT}]


def complete(model: str, endpoint: str = "generate", max_tokens: int = MAX_TOKENS, **fields: Any) -> Any:
    url = f"http://{ARGUMENTS.http}/v2/models/{model}/{endpoint}"
    return litellm.completion(f"triton/{model}", MESSAGES, api_base=url, max_tokens=max_tokens, **fields)


def text(response: Any) -> str:
    return str(response.choices[0].message.content)


def stream(**fields: Any) -> Iterator[str]:
    for chunk in complete(ARGUMENTS.streaming_model, stream=True, **fields):
        if piece := chunk.choices[0].delta.content:
            yield piece


tell("`/generate`", "whole", lambda: text(complete(ARGUMENTS.model)))
tell("`/generate`", "stop words", lambda: text(complete(ARGUMENTS.model, stop_words=[STOP_WORD])))
tell("`/generate`", "error", lambda: text(complete(ARGUMENTS.model, max_tokens=0)))
tell("`/generate`, `stream=True`", "streamed", stream)
tell("`/generate`, `stream=True`", "stop words", lambda: stream(stop_words=[STOP_WORD]))
tell("`/generate`, `stream=True`", "error", lambda: stream(max_tokens=0))
tell("`/infer`", "whole", lambda: text(complete(ARGUMENTS.model, "infer")), **INFER)
end()
