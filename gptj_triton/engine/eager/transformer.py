"""GPT-J's forward pass over a packed batch. Knows nothing of checkpoints, requests or sampling.

A block is parallel, x + attention(ln(x)) + mlp(ln(x)) with one LayerNorm, so q, k, v and the first matrix of the MLP
are one product, and the output projection and the second matrix of the MLP another: two large matrix products a layer.
Source: Wang and Komatsuzaki (2021), GPT-J-6B; the operations and their order are those of `transformers`' GPTJModel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.weights import LayerWeights, ModelWeights
from gptj_triton.engine.eager.attention import attend
from gptj_triton.engine.eager.batch import Batch
from gptj_triton.engine.kv_cache import KVCache
from gptj_triton.engine.rotary import rotary_table, rotate

MOST_CPU_ROWS = 128


class Transformer:
    """GPT-J as a function of a batch and a KV cache, or one rank's part of it.

    `all_reduce` sums a tensor over all ranks; each calls it once a layer, for the block is parallel.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights[Tensor], all_reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self._all_reduce = all_reduce
        self.rotations = rotary_table(config, weights.embedding.device)

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Write the batch's K and V to the cache; returns float32 logits [samples, V] of `batch.last_rows`."""
        hidden = self.hidden_states(batch, cache)[batch.last_rows]
        hidden = self._norm(hidden, self.weights.norm_weight, self.weights.norm_bias)
        return linear(hidden, self.weights.head_weight, self.weights.head_bias).float()

    def hidden_states(self, batch: Batch, cache: KVCache) -> Tensor:
        """Write the batch's K and V to the cache; returns what the last layer makes of each token, [T, H]."""
        hidden = functional.embedding(batch.token_ids, self.weights.embedding)
        rotations = self.rotations[batch.positions][:, None]
        for number, layer in enumerate(self.weights.layers):
            hidden = hidden + self._block(number, layer, hidden, rotations, batch, cache)
        return hidden

    def _block(
        self, number: int, layer: LayerWeights[Tensor], hidden: Tensor, rotations: Tensor, batch: Batch, cache: KVCache
    ) -> Tensor:
        config = self.config
        normed = self._norm(hidden, layer.norm_weight, layer.norm_bias)
        projected = linear(normed, layer.in_weight, layer.in_bias)  # [T, 3A + F]
        heads = projected[:, : 3 * layer.heads_size].unflatten(1, (3, -1, config.head_size))
        rotate(heads[:, :2], rotations[:, None])
        query, key, value = heads.unbind(1)
        cache.write(number, batch.pages, batch.slots, key, value)
        attended = attend(cache, number, batch, query).flatten(1)
        activated = functional.gelu(projected[:, 3 * layer.heads_size :], approximate="tanh")
        result = linear(torch.cat((attended, activated), dim=1), layer.out_weight, layer.out_bias)
        return result if self._all_reduce is None else self._all_reduce(result)

    def _norm(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(hidden, (self.config.hidden_size,), weight, bias, self.config.layer_norm_eps)


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`rows @ weight + bias`: [R, in] by [in, out]; on a CPU a row's result is the same bits whatever R is.

    The CPU's GEMM adds a row's products in one order from 2 rows to at least MOST_CPU_ROWS, in another for a single
    row.
    """
    if rows.device.type == "cpu" and rows.shape[0] == 1:
        return torch.addmm(bias, rows.expand(2, -1), weight)[:1]
    if rows.device.type != "cpu" or rows.shape[0] <= MOST_CPU_ROWS:
        return torch.addmm(bias, rows, weight)
    count = -(-rows.shape[0] // MOST_CPU_ROWS)
    return torch.cat([torch.addmm(bias, part, weight) for part in rows.tensor_split(count)])
