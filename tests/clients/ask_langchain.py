# /// script
# dependencies = ["langchain-nvidia-trt==0.0.1rc0", "langchain-core==0.2.43"]
# ///
"""LangChain's `TritonTensorRTLLM`, which streams over gRPC."""

from __future__ import annotations

from typing import Any

import numpy as np
from asked import MAX_TOKENS, PROMPT, end, read_arguments, tell
from langchain_nvidia_trt.llms import TritonTensorRTLLM

ARGUMENTS = read_arguments()
WHY = "it sends UINT32 where the fields are INT32"


class Signed(TritonTensorRTLLM):  # type: ignore[misc]
    """With the types that the server's fields have."""

    def _prepare_tensor(self, name: str, input_data: Any) -> Any:
        return super()._prepare_tensor(
            name, input_data.astype(np.int32) if input_data.dtype == np.uint32 else input_data
        )


def llm(kind: type[TritonTensorRTLLM]) -> TritonTensorRTLLM:
    return kind(server_url=ARGUMENTS.grpc, model_name=ARGUMENTS.streaming_model, tokens=MAX_TOKENS)


# The server's words are lost: it takes the error for a piece of the text, and fails at that.
tell("`invoke`", "whole", lambda: llm(TritonTensorRTLLM).invoke(PROMPT), refused="InferenceServerException", why=WHY)
tell("`stream`", "streamed", lambda: llm(TritonTensorRTLLM).stream(PROMPT), refused="str type expected", why=WHY)
tell("`invoke`, with INT32", "whole", lambda: llm(Signed).invoke(PROMPT))
tell("`stream`, with INT32", "streamed", lambda: llm(Signed).stream(PROMPT))
end()
