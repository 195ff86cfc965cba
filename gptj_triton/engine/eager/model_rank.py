"""One rank's part of the model: its device, its weights and its KV cache. Knows neither sequences nor other processes.

The ranks of a model get the same calls in the same order; each has some of the heads and some of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import Shard
from gptj_triton.checkpoint.weights import load_weights
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.device import choose_device, compute_type, memory_left
from gptj_triton.engine.eager.batch import build_batch
from gptj_triton.engine.eager.transformer import Transformer
from gptj_triton.engine.kv_cache import PAGE_SIZE, KVCache
from gptj_triton.engine.step_plan import StepPlan


class ModelRank:
    """`device` and `dtype` are what the engine's settings stand for here."""

    def __init__(
        self, config: EngineConfig, model: ModelConfig, rank: int, all_reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Load the weights of `rank`; `all_reduce` sums a tensor over all ranks. Raises ConfigError."""
        self.device = choose_device(config.device, rank, config.tensor_para_size)
        self.dtype = compute_type(config.data_type, self.device).dtype
        self._model = model
        self._shard = Shard(rank, config.tensor_para_size)
        weights = load_weights(config.checkpoint, model, self.dtype, self.device, self._shard)
        self._transformer = Transformer(model, weights, all_reduce)
        self.allocate(num_pages=1)

    @property
    def page_bytes(self) -> int:
        """Memory that one page of the KV cache takes up on this rank."""
        return KVCache.page_bytes(self._model, self.dtype, self._shard)

    def allocate(self, num_pages: int) -> None:
        """Make an empty KV cache of that size, in the place of the one that was."""
        self._cache = KVCache(self._model, num_pages, self.dtype, self.device, self._shard)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        """Compute a step; returns float32 logits [samples, V] of the plan's `last_rows`, on rank 0 only."""
        self._cache.copy_pages(plan.copies)
        heads = self._model.num_heads // self._shard.size
        batch = build_batch(plan, heads, self._model.head_size, PAGE_SIZE, self.dtype, self.device)
        if self._shard.rank > 0:
            return self._transformer.hidden_states(batch, self._cache)[:0]
        return self._transformer.forward(batch, self._cache)

    def measure(self, plan: StepPlan, use: Callable[[Tensor], object]) -> int:
        """Bytes of the GPU that are left when a step is computed and `use` made of its logits."""
        return memory_left(self.device, lambda: use(self.forward(plan)))
