"""Turns a checkpoint of either kind into the engine's merged matrices, which are filled slice by slice.

Knows the engine's layout; knows neither files nor families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gptj_triton.checkpoint.fastertransformer import FasterTransformerWeights
from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.checkpoint.huggingface import HuggingFaceWeights
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import UNSHARDED, Shard, model_tensors


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


# How a device keeps the matrices of the layers, of which nearly all weights are.
Matrix = TypeVar("Matrix", bound=HasShape)


@dataclass(frozen=True)
class LayerWeights(Generic[Matrix]):
    """One block: H hidden size; A the size of a rank's heads together, F of its part of the MLP (with one rank H and
    the inner size). Matrices are [in, out], as FasterTransformer stores them.

    `in_weight` [H, 3A + F] is q, k, v and fc_in side by side; `out_weight` [A + F, H] is out_proj above fc_out.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    in_weight: Matrix
    in_bias: Tensor
    out_weight: Matrix
    out_bias: Tensor

    @property
    def heads_size(self) -> int:
        """A: in_weight has it three times in its columns, out_weight once in its rows."""
        return (self.in_weight.shape[1] - self.out_weight.shape[0]) // 2


@dataclass(frozen=True)
class ModelWeights(Generic[Matrix]):
    """All weights of a rank: V is the vocabulary. `embedding` [V, H], `head_weight` [H, V], `head_bias` [V]."""

    embedding: Tensor
    layers: list[LayerWeights[Matrix]]
    norm_weight: Tensor
    norm_bias: Tensor
    head_weight: Tensor
    head_bias: Tensor


class WeightSource(Protocol):
    """A checkpoint on disk, of either kind."""

    @property
    def data_type(self) -> str | None:
        """A name in WEIGHT_TYPES, None for any other type."""

    def copy(self, name: str, destination: Tensor) -> None:
        """Fill `destination` with a tensor of the table, converted to its type and device."""


def open_weights(checkpoint: Path, config: ModelConfig) -> WeightSource:
    """The source that fits the directory; ConfigError when what it holds does not fit `config`."""
    files = find_checkpoint_files(checkpoint)
    if files.is_fastertransformer:
        return FasterTransformerWeights(files.directory, config)
    return HuggingFaceWeights(files.directory, config)


def load_weights(
    checkpoint: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: Shard = UNSHARDED
) -> ModelWeights[Tensor]:
    """Load a rank's weights as `dtype` to `device`; never holds more than one tensor besides the result.

    Raises ConfigError naming the file, what was expected and what was found.
    """
    return load_converted_weights(checkpoint, config, dtype, device, lambda matrix: matrix, shard)


def load_converted_weights(
    checkpoint: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    convert: Callable[[Tensor], Matrix],
    shard: Shard = UNSHARDED,
) -> ModelWeights[Matrix]:
    """The same, with each matrix of a layer converted by `convert` before the next one is loaded."""
    source = open_weights(checkpoint, config)
    tensors = model_tensors(config)
    hidden, inner = config.hidden_size, config.inner_size // shard.size
    attention = hidden // shard.size  # the heads of this rank

    def fill(name: str, destination: Tensor) -> None:
        spec = tensors[name]
        if shard.size == 1 or spec.split is None:
            source.copy(name, destination)
            return
        full = torch.empty(spec.shape, dtype=dtype, device=device)
        source.copy(name, full)
        destination.copy_(spec.parts(full, shard.size)[shard.rank])

    def matrix(rows: int, columns: int) -> Tensor:
        # A GPU's kernels read a column at a time; on a CPU the exactness of `linear` needs the rows whole.
        if device.type == "cuda":
            return torch.empty(columns, rows, dtype=dtype, device=device).T
        return torch.empty(rows, columns, dtype=dtype, device=device)

    def load(name: str) -> Tensor:
        tensor = torch.empty(tensors[name].shape, dtype=dtype, device=device)
        fill(name, tensor)
        return tensor

    def load_layer(number: int) -> LayerWeights[Matrix]:
        layer = f"layers.{number}."
        in_weight = matrix(hidden, 3 * attention + inner)
        fill(f"{layer}attention.query_key_value.weight", in_weight[:, : 3 * attention].unflatten(1, (3, attention)))
        fill(f"{layer}mlp.dense_h_to_4h.weight", in_weight[:, 3 * attention :])
        in_matrix = convert(in_weight)
        del in_weight
        in_bias = torch.zeros(3 * attention + inner, dtype=dtype, device=device)
        fill(f"{layer}mlp.dense_h_to_4h.bias", in_bias[3 * attention :])
        out_weight = matrix(attention + inner, hidden)
        fill(f"{layer}attention.dense.weight", out_weight[:attention])
        fill(f"{layer}mlp.dense_4h_to_h.weight", out_weight[attention:])
        out_bias = load(f"{layer}mlp.dense_4h_to_h.bias")
        if shard.rank > 0:
            out_bias.zero_()  # the ranks' results are summed, and the sum has the bias once
        return LayerWeights(
            norm_weight=load(f"{layer}input_layernorm.weight"),
            norm_bias=load(f"{layer}input_layernorm.bias"),
            in_weight=in_matrix,
            in_bias=in_bias,
            out_weight=convert(out_weight),
            out_bias=out_bias,
        )

    head_weight = matrix(hidden, config.vocab_size)
    fill("lm_head.weight", head_weight.T)
    return ModelWeights(
        embedding=load("wte"),
        layers=[load_layer(number) for number in range(config.num_layers)],
        norm_weight=load("final_layernorm.weight"),
        norm_bias=load("final_layernorm.bias"),
        head_weight=head_weight,
        head_bias=load("lm_head.bias"),
    )
