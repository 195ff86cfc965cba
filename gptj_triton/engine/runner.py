"""Turns a scheduled step into sampled tokens: plan, forward pass, sampler. Sizes the KV cache and counts its pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.device import choose_device
from gptj_triton.engine.eager.sharded_model import ShardedModel
from gptj_triton.engine.kv_cache import PAGE_SIZE
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.sampler import sample
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Sampled, Sequence
from gptj_triton.engine.step_plan import StepPlan, plan_step
from gptj_triton.errors import ConfigError

DEFAULT_CPU_MEMORY = 2**30  # bytes for the KV cache of a rank; the system hands them out as they are used


class Model(Protocol):
    """What a runner needs of a model, however many processes and kernels it is made of."""

    @property
    def device(self) -> torch.device: ...
    @property
    def page_bytes(self) -> int: ...
    def allocate(self, num_pages: int) -> None: ...
    def forward(self, plan: StepPlan) -> Tensor: ...
    def measure(self, plan: StepPlan, use: Callable[[Tensor], object]) -> int: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Launched:
    """A step under way. `take` waits for what was chosen for each of `sequences`."""

    sequences: list[Sequence]
    take: Callable[[], list[list[Sampled]]]


class Runner:
    """`pool` counts the pages of the KV cache that was allocated; `depth` is how many steps may be under way when the
    next one is launched.
    """

    depth = 0

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        """Load the model and allocate the KV cache; ConfigError when that cannot be done."""
        self._model = self._load(config, model)
        try:
            num_pages = self._num_pages(config, model.context_length)
            self._model.allocate(num_pages)
        except BaseException:
            self.close()
            raise
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self._sampled: list[Sequence] = []

    @property
    def device(self) -> torch.device:
        return self._model.device

    def runs_ahead_of(self, sequences: Iterable[Sequence]) -> bool:
        """Whether the next step can be launched before the tokens of the last one are known."""
        return self.depth > 0

    @torch.inference_mode()
    def launch(self, step: SequenceOf[Scheduled]) -> Launched:
        """Begin to compute a step that is not empty."""
        plan, sampling = plan_step(step, self.pool, self._sampled)
        logits = self._model.forward(plan)
        for scheduled in step:
            self.pool.computed(scheduled.sequence, scheduled.num_tokens)
        self._sampled = sampling
        return Launched(sampling, self._choose(logits, sampling) if sampling else list)

    @torch.inference_mode()
    def collect(self, launched: Launched) -> list[tuple[Sequence, list[Sampled]]]:
        """The sequences that get a new token, each with what was chosen for it."""
        return list(zip(launched.sequences, launched.take(), strict=True))

    def _load(self, config: EngineConfig, model: ModelConfig) -> Model:
        return ShardedModel(config, model)

    def _choose(self, logits: Tensor, sampling: list[Sequence]) -> Callable[[], list[list[Sampled]]]:
        """Begin to choose tokens from float32 `logits` [samples, V], which the next step may overwrite."""
        return lambda: sample(logits, sampling)

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
        chunk = min(config.step_tokens, context)
        cached = [context - 1] * (config.max_sequences - 1)
        cached += [context - chunk] * -(-config.step_tokens // chunk)
        pages = [0] * -(-context // PAGE_SIZE)
        sequences = [Sequence(None, [0] * context, params, pages=pages, num_cached=length) for length in cached]
        step = [Scheduled(sequence, sequence.num_uncached) for sequence in sequences]
        plan, sampling = plan_step(step, PagePool(1, PAGE_SIZE))
        return self._model.measure(plan, lambda logits: sample(logits, sampling))


OLDEST_GPU = (8, 0)  # compute capability: Ampere


def make_runner(config: EngineConfig, model: ModelConfig) -> Runner:
    """The runner that fits the device: kernels and graphs of its own on one GPU, plain torch everywhere else."""
    device = choose_device(config.device, 0, config.tensor_para_size)
    alone = device.type == "cuda" and config.tensor_para_size == 1
    suits_kernels = model.head_size >= 16 and model.head_size.bit_count() == 1
    if alone and suits_kernels and torch.cuda.get_device_capability(device) >= OLDEST_GPU:
        from gptj_triton.engine.gpu.runner import GpuRunner  # it needs triton, which only torch for GPUs brings along

        return GpuRunner(config, model)
    return Runner(config, model)
