"""One rank's part of the model: its device, its weights and its KV cache. Knows neither sequences nor other processes.

The ranks of a model get the same calls in the same order; each has some of the heads and some of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptj_engine.attention import PAGE_SIZE, KVCache
from gptj_engine.batch import StepPlan, build_batch
from gptj_engine.config import EngineConfig, ModelConfig
from gptj_engine.errors import ConfigError
from gptj_engine.tensor_table import DTYPES, Shard
from gptj_engine.transformer import Transformer
from gptj_engine.weights import load_weights

SPARE_MEMORY = 0.03  # of a GPU, left to fragmentation and the libraries' workspaces


class ModelRank:
    """`device` and `dtype` are what the engine's settings stand for here."""

    def __init__(
        self, config: EngineConfig, model: ModelConfig, rank: int, add_up: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Load the weights of `rank`; ConfigError when that cannot be done. `add_up` sums a tensor over all ranks."""
        self.device = choose_device(config.device, rank, config.tensor_para_size)
        self.dtype = DTYPES[choose_data_type(config.data_type, self.device)]
        self._model = model
        self._shard = Shard(rank, config.tensor_para_size)
        weights = load_weights(config.checkpoint, model, self.dtype, self.device, self._shard)
        self._transformer = Transformer(model, weights, add_up)
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


def memory_left(device: torch.device, compute: Callable[[], object]) -> int:
    """Bytes of a GPU that `compute` leaves when it takes the most, and some are spared."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - peak - SPARE_MEMORY * total)


def choose_device(name: str, rank: int = 0, size: int = 1) -> torch.device:
    """The device that `name` (auto, cpu or cuda) stands for here, for one of `size` ranks.

    Raises ConfigError when there is no such one, or there are too few.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA GPU here")
    if torch.cuda.device_count() < size:
        raise ConfigError(f"tensor_para_size is {size}, but torch finds {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda", rank)


def choose_data_type(name: str, device: torch.device) -> str:
    """The data type that `name` (auto, fp32, fp16 or bf16) stands for on a device."""
    if name == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    return name
