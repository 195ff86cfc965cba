"""What the decode step and the prefill step share: the model on its GPU, and how work is captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.gpu.weights import GpuWeights

Result = TypeVar("Result")


@dataclass(frozen=True)
class GpuParts:
    """Weights and tables. What changes are `sampled`, int32: the tokens that the step before sampled, to which a plan
    may refer; and `cache_indirection`, uint8 [slots, MOST_BEAMS, context], of searches (see BeamState). `cos`, `sin`
    float32 [context, rotary_dim / 2]; `table_width` is the most pages of a sequence.
    """

    model: ModelConfig
    weights: GpuWeights
    cos: Tensor
    sin: Tensor
    sampled: Tensor
    cache_indirection: Tensor
    table_width: int

    @property
    def device(self) -> torch.device:
        return self.sampled.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.weights.embedding.dtype


@torch.inference_mode()
def capture(
    compute: Callable[[], Result], stream: torch.cuda.Stream, companion: torch.cuda.CUDAGraph | None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `compute`, and its result. It shares the memory of `companion`, and cuBLAS's workspace with all that
    is captured on the same `stream`: they must never run at once.
    """
    compute()  # compiles what is not in Triton's cache yet
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=companion.pool() if companion else None, stream=stream):
        result = compute()
    return graph, result
