"""The tensors of a GPT-J checkpoint: FasterTransformer's names, whole shapes, and how tensor parallelism splits them.

Both kinds of checkpoint answer to this table. Knows no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gptj_engine.config import ModelConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TensorSpec:
    """`name` is FasterTransformer's file name without `model.` and `.bin`; `split` is the axis that ranks share, None
    where each has the whole.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None


def gptj_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
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
