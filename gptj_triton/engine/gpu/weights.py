"""The model's weights on one GPU. The matrices of its layers have 16 or 32 bits a number, or are quantized to 8.

Embedding and head are not: they are 7 % of GPT-J 6B, and the head's error would be the logits'. Knows neither kernels
nor steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.weights import ModelWeights, load_converted_weights
from gptj_triton.engine.device import FLOAT8

# The largest number of each type of 8 bits: the largest weight of an output column becomes this.
LARGEST = {FLOAT8: 448.0, torch.int8: 127.0}
COLUMNS_AT_ONCE = 256  # so that little memory is needed besides


@dataclass(frozen=True)
class Matrix:
    """A matrix [K, N]: `values`, a view of [N, K] with K contiguous; times `scales` [N] float32 if it is quantized."""

    values: Tensor
    scales: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def columns(self, start: int, end: int | None = None) -> Matrix:
        """The columns from `start` to `end`, as a view."""
        scales = None if self.scales is None else self.scales[start:end]
        return Matrix(self.values[:, start:end], scales)

    def rows(self, start: int, end: int | None = None) -> Matrix:
        """The rows from `start` to `end`, as a view."""
        return Matrix(self.values[start:end], self.scales)


GpuWeights: TypeAlias = ModelWeights[Matrix]


def load_gpu_weights(
    checkpoint: Path, model: ModelConfig, dtype: torch.dtype, device: torch.device, matrix_dtype: torch.dtype
) -> GpuWeights:
    """All weights as `dtype`, the layers' matrices as `matrix_dtype`, quantized one by one. Raises ConfigError."""
    convert = Matrix if matrix_dtype == dtype else partial(quantize, dtype=matrix_dtype)
    return load_converted_weights(checkpoint, model, dtype, device, convert)


def quantize(weight: Tensor, dtype: torch.dtype) -> Matrix:
    """`weight` [K, N], a view of [N, K], in 8 bits with a scale a column."""
    if weight.device.type == "cuda":
        torch.cuda.empty_cache()  # else what is kept takes a part of a larger block that was given back
    values = torch.empty_like(weight.T, dtype=dtype)
    scales = torch.empty(len(values), device=weight.device)
    for columns, target, scale in zip(
        *(each.split(COLUMNS_AT_ONCE) for each in (weight.T, values, scales)), strict=True
    ):
        largest = columns.abs().amax(dim=1).float()
        scale.copy_(torch.where(largest > 0, largest / LARGEST[dtype], 1.0))
        exact = columns / scale[:, None]
        target.copy_(exact if dtype.is_floating_point else exact.round())
    return Matrix(values.T, scales)
