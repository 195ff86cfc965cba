"""Turns a scheduled step into sampled tokens: batch, forward pass, sampler. Owns the device, the weights and the KV
cache.
"""

from __future__ import annotations

import torch

from gptj_engine.attention import PAGE_SIZE, KVCache
from gptj_engine.batch import build_batch
from gptj_engine.config import EngineConfig, ModelConfig
from gptj_engine.errors import ConfigError
from gptj_engine.kv_pages import PagePool
from gptj_engine.sampler import Sampled, sample
from gptj_engine.sampling_params import SamplingParams
from gptj_engine.scheduler import Scheduled
from gptj_engine.sequence import Sequence
from gptj_engine.tensor_table import DTYPES
from gptj_engine.transformer import Transformer
from gptj_engine.weights import load_weights

DEFAULT_CPU_MEMORY = 2**30  # bytes for the KV cache; the system hands them out as they are used
SPARE_MEMORY = 0.03  # of a GPU, left to fragmentation and the libraries' workspaces


class Runner:
    """`pool` counts the pages of the KV cache that was allocated."""

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        self.device = choose_device(config.device)
        dtype = DTYPES[choose_data_type(config.data_type, self.device)]
        weights = load_weights(config.checkpoint, model, dtype, self.device)
        self._transformer = Transformer(model, weights)
        self._num_heads = model.num_heads
        num_pages = self._num_pages(config, model, dtype)
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self._cache = KVCache(model, num_pages, dtype, self.device)

    @torch.inference_mode()
    def run(self, step: list[Scheduled]) -> list[tuple[Sequence, list[Sampled]]]:
        """Compute a step; returns the sequences that get a new token, each with what `sample` chose for it."""
        if not step:
            return []
        self._cache.copy_pages(self.pool.copies)
        self.pool.copies.clear()
        batch = build_batch(step, self.pool, self._num_heads, self.device)
        logits = self._transformer.forward(batch, self._cache)
        for scheduled in step:
            self.pool.computed(scheduled.sequence, scheduled.num_tokens)
        if not batch.sampling:
            return []
        return list(zip(batch.sampling, sample(logits, batch.sampling), strict=True))

    def _num_pages(self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
        """Pages that fit the memory there is, and no more than `max_sequences` full contexts can use."""
        page_bytes = KVCache.page_bytes(model, dtype)
        wanted = int(config.kv_cache_gib * 2**30)
        if self.device.type == "cuda":
            left = self._memory_after_warm_up(config, model, dtype)
            memory = min(wanted or left, left)
        else:
            memory = wanted or DEFAULT_CPU_MEMORY
        context_pages = -(-model.context_length // PAGE_SIZE)
        num_pages = min(memory // page_bytes, config.max_sequences * context_pages)
        if num_pages < context_pages:
            needed = context_pages * page_bytes / 2**30
            raise ConfigError(f"the KV cache has {memory / 2**30:.2f} GiB, one full context needs {needed:.2f} GiB")
        return num_pages

    @torch.inference_mode()
    def _memory_after_warm_up(self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of the GPU that are left for the KV cache, measured by computing the largest step that can come."""
        params = SamplingParams(request_output_len=1, end_id=0, runtime_top_k=50, runtime_top_p=0.5)
        context = model.context_length
        cached = [context - 1] * config.max_sequences + [max(0, context - config.step_tokens)]
        pages = [0] * -(-context // PAGE_SIZE)
        sequences = [Sequence(None, [0] * context, params, pages=pages, num_cached=length) for length in cached]
        step = [Scheduled(sequence, sequence.num_uncached) for sequence in sequences]
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        batch = build_batch(step, PagePool(1, PAGE_SIZE), self._num_heads, self.device)
        sample(self._transformer.forward(batch, KVCache(model, 1, dtype, self.device)), batch.sampling)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free - peak - SPARE_MEMORY * total)


def choose_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu or cuda) stands for here; ConfigError when there is no such one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA GPU here")
    return torch.device(name)


def choose_data_type(name: str, device: torch.device) -> str:
    """The data type that `name` (auto, fp32, fp16 or bf16) stands for on a device."""
    if name == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    return name
