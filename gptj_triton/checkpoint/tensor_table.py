"""The tensors of a model: FasterTransformer's names for GPT-J, full shapes, and how tensor parallelism splits them.

Every family and both kinds of checkpoint are mapped to this table. Knows no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """The part of a model that one rank has, of `size` ranks that share it evenly (tensor parallelism)."""

    rank: int = 0
    size: int = 1


UNSHARDED = Shard()


@dataclass(frozen=True)
class TensorSpec:
    """One tensor, unsharded.

    `name` is FasterTransformer's file name without `model.` and `.bin`. `split` is the axis along which the ranks share
    the tensor, None where each rank has all of it.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None

    def parts(self, full: Tensor, tensor_para_size: int) -> list[Tensor]:
        """The part of each rank, as views of `full`; a single one, `full` itself, where the tensor is not split."""
        return [full] if self.split is None else list(full.tensor_split(tensor_para_size, dim=self.split))


def check_split(config: ModelConfig, tensor_para_size: int) -> None:
    """ConfigError unless that many GPUs can share the heads and the inner size evenly."""
    for name, size in (("heads", config.num_heads), ("inner size", config.inner_size)):
        if tensor_para_size < 1 or size % tensor_para_size:
            raise ConfigError(f"a split into {tensor_para_size} does not divide the {name}, {size}")


def model_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor by name: matrices of the layers are [in, out], wte and lm_head [vocabulary, hidden].

    Source: FasterTransformer, GptJWeight.cc and GptJDecoderLayerWeight.cc.
    """
    return {tensor.name: tensor for tensor in _list_tensors(config)}


def _list_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    hidden, inner, vocab = config.hidden_size, config.inner_size, config.vocab_size
    yield TensorSpec("wte", (vocab, hidden))
    for number in range(config.num_layers):
        layer = f"layers.{number}."
        yield TensorSpec(f"{layer}input_layernorm.weight", (hidden,))
        yield TensorSpec(f"{layer}input_layernorm.bias", (hidden,))
        yield TensorSpec(f"{layer}attention.query_key_value.weight", (hidden, 3, hidden), split=2)
        yield TensorSpec(f"{layer}attention.dense.weight", (hidden, hidden), split=0)
        yield TensorSpec(f"{layer}mlp.dense_h_to_4h.weight", (hidden, inner), split=1)
        yield TensorSpec(f"{layer}mlp.dense_h_to_4h.bias", (inner,), split=0)
        yield TensorSpec(f"{layer}mlp.dense_4h_to_h.weight", (inner, hidden), split=0)
        yield TensorSpec(f"{layer}mlp.dense_4h_to_h.bias", (hidden,))
    yield TensorSpec("final_layernorm.weight", (hidden,))
    yield TensorSpec("final_layernorm.bias", (hidden,))
    yield TensorSpec("lm_head.weight", (vocab, hidden))
    yield TensorSpec("lm_head.bias", (vocab,))
