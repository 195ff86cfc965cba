"""How many pages the KV cache gets: what the memory holds, measured on a GPU by computing the largest step."""

from __future__ import annotations

import torch

from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.kv_cache import PAGE_SIZE
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.runner import Model
from gptj_triton.engine.sampler import sample
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Sequence
from gptj_triton.engine.step_plan import plan_step
from gptj_triton.errors import ConfigError

DEFAULT_CPU_MEMORY = 2**30  # bytes for the KV cache of a rank; the system hands them out as they are used


def count_pages(config: EngineConfig, model: Model, context_length: int) -> int:
    """Pages that fit the memory there is, and no more than `max_sequences` full contexts can use.

    Raises ConfigError where one full context does not fit.
    """
    wanted = int(config.kv_cache_gib * 2**30)
    if model.device.type == "cuda":
        left = _memory_after_largest_step(config, model, context_length)
        memory = min(wanted or left, left)
    else:
        memory = wanted or DEFAULT_CPU_MEMORY
    context_pages = -(-context_length // PAGE_SIZE)
    num_pages = min(memory // model.page_bytes, config.max_sequences * context_pages)
    if num_pages < context_pages:
        needed = context_pages * model.page_bytes / 2**30
        raise ConfigError(f"the KV cache has {memory / 2**30:.2f} GiB, one full context needs {needed:.2f} GiB")
    return num_pages


@torch.inference_mode()
def _memory_after_largest_step(config: EngineConfig, model: Model, context: int) -> int:
    """Bytes of a GPU that are left for the KV cache beside the largest step that can come."""
    params = SamplingParams(request_output_len=1, end_ids=(), runtime_top_k=50, runtime_top_p=0.5)
    chunk = min(config.step_tokens, context)
    cached = [context - 1] * (config.max_sequences - 1)
    cached += [context - chunk] * -(-config.step_tokens // chunk)
    pages = [0] * -(-context // PAGE_SIZE)
    sequences = [Sequence(None, [0] * context, params, pages=pages, num_cached=length) for length in cached]
    step = [Scheduled(sequence, sequence.num_uncached) for sequence in sequences]
    plan, sampling = plan_step(step, PagePool(1, PAGE_SIZE))
    return model.measure(plan, lambda logits: sample(logits, sampling))
