# /// script
# dependencies = ["llama-index-llms-nvidia-triton==0.6.0"]
# ///
"""LlamaIndex's `NvidiaTriton`, which streams over gRPC."""

from __future__ import annotations

from collections.abc import Iterator

from asked import MAX_TOKENS, PROMPT, end, read_arguments, tell
from llama_index.llms.nvidia_triton import NvidiaTriton

ARGUMENTS = read_arguments()


def llm(tokens: int = MAX_TOKENS) -> NvidiaTriton:
    # Its option `model` is ignored.
    return NvidiaTriton(server_url=ARGUMENTS.grpc, model_name=ARGUMENTS.streaming_model, tokens=tokens)


def stream() -> Iterator[str]:
    for piece in llm().stream_complete(PROMPT):
        yield piece.delta


# It stops at as many pieces as it asks for tokens, less one.
tell("`complete`", "all but the last piece", lambda: llm().complete(PROMPT).text)
tell("`complete`", "error", lambda: llm(0).complete(PROMPT).text)
tell("`stream_complete`", "all but the last piece", stream)
end()
