"""Turns a scheduled step into sampled tokens: plan, forward pass, sampler. Sizes the KV cache and counts its pages."""

from __future__ import annotations

import torch

from gptj_engine.attention import PAGE_SIZE
from gptj_engine.batch import plan_step
from gptj_engine.config import EngineConfig, ModelConfig
from gptj_engine.errors import ConfigError
from gptj_engine.kv_pages import PagePool
from gptj_engine.sampler import Sampled, sample
from gptj_engine.sampling_params import SamplingParams
from gptj_engine.scheduler import Scheduled
from gptj_engine.sequence import Sequence
from gptj_engine.sharded_model import ShardedModel

DEFAULT_CPU_MEMORY = 2**30  # bytes for the KV cache of a rank; the system hands them out as they are used


class Runner:
    """`pool` counts the pages of the KV cache that was allocated."""

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        """Load the model and allocate the KV cache; ConfigError when that cannot be done."""
        self._model = ShardedModel(config, model)
        try:
            num_pages = self._num_pages(config, model.context_length)
            self._model.allocate(num_pages)
        except BaseException:
            self.close()
            raise
        self.pool = PagePool(num_pages, PAGE_SIZE)

    @property
    def device(self) -> torch.device:
        return self._model.device

    @torch.inference_mode()
    def run(self, step: list[Scheduled]) -> list[tuple[Sequence, list[Sampled]]]:
        """Compute a step; returns the sequences that get a new token, each with what `sample` chose for it."""
        if not step:
            return []
        plan, sampling = plan_step(step, self.pool)
        logits = self._model.forward(plan)
        for scheduled in step:
            self.pool.computed(scheduled.sequence, scheduled.num_tokens)
        return list(zip(sampling, sample(logits, sampling), strict=True)) if sampling else []

    def close(self) -> None:
        """Let go of the model's other processes, if it has some."""
        self._model.close()

    def _num_pages(self, config: EngineConfig, context_length: int) -> int:
        """Pages that fit the memory there is, and no more than `max_sequences` full contexts can use."""
        page_bytes = self._model.page_bytes
        wanted = int(config.kv_cache_gib * 2**30)
        if self.device.type == "cuda":
            left = self._memory_after_warm_up(config, context_length)
            memory = min(wanted or left, left)
        else:
            memory = wanted or DEFAULT_CPU_MEMORY
        context_pages = -(-context_length // PAGE_SIZE)
        num_pages = min(memory // page_bytes, config.max_sequences * context_pages)
        if num_pages < context_pages:
            needed = context_pages * page_bytes / 2**30
            raise ConfigError(f"the KV cache has {memory / 2**30:.2f} GiB, one full context needs {needed:.2f} GiB")
        return num_pages

    @torch.inference_mode()
    def _memory_after_warm_up(self, config: EngineConfig, context: int) -> int:
        """Bytes of a GPU that are left for the KV cache, measured by computing the largest step that can come."""
        params = SamplingParams(request_output_len=1, end_id=0, runtime_top_k=50, runtime_top_p=0.5)
        cached = [context - 1] * config.max_sequences + [max(0, context - config.step_tokens)]
        pages = [0] * -(-context // PAGE_SIZE)
        sequences = [Sequence(None, [0] * context, params, pages=pages, num_cached=length) for length in cached]
        step = [Scheduled(sequence, sequence.num_uncached) for sequence in sequences]
        plan, sampling = plan_step(step, PagePool(1, PAGE_SIZE))
        return self._model.measure(plan, lambda logits: sample(logits, sampling))
