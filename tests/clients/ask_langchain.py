# /// script
# dependencies = ["langchain-nvidia-trt==0.0.1rc0", "langchain-core==0.2.43"]
# ///
"""LangChain's `TritonTensorRTLLM`, which streams over gRPC."""

from __future__ import annotations

from asked import MAX_TOKENS, PROMPT, end, read_arguments, tell
from langchain_nvidia_trt.llms import TritonTensorRTLLM

ARGUMENTS = read_arguments()
llm = TritonTensorRTLLM(server_url=ARGUMENTS.grpc, model_name=ARGUMENTS.streaming_model, tokens=MAX_TOKENS)
UNSIGNED = {"refused": "UINT32", "why": "it sends UINT32 where the fields are INT32"}

tell("`invoke`", "whole", lambda: llm.invoke(PROMPT), **UNSIGNED)
tell("`stream`", "streamed", lambda: llm.stream(PROMPT), **UNSIGNED)
end()
