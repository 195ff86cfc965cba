"""A model on one GPU: the decode step and the prefill step of a plan run side by side.

Takes the same plans as engine/eager, which is the reference: rows with one new token decode, all others are packed
chunks of prompts. Knows no sequences. V is the vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gptj_triton.checkpoint.data_types import FP8
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.beam import most_searches
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.device import FLOAT8, compute_type, memory_left
from gptj_triton.engine.gpu.beam_state import MOST_BEAMS
from gptj_triton.engine.gpu.decode_step import DecodeStep
from gptj_triton.engine.gpu.graphs import GpuParts
from gptj_triton.engine.gpu.kv_cache import GpuKVCache
from gptj_triton.engine.gpu.prefill_step import PrefillStep
from gptj_triton.engine.gpu.transfer import to_device
from gptj_triton.engine.gpu.weights import load_gpu_weights
from gptj_triton.engine.kv_cache import PAGE_SIZE
from gptj_triton.engine.rotary import rotary_table
from gptj_triton.engine.step_plan import StepPlan

log = logging.getLogger("gptj_triton")


class GpuModel:
    """Steps are queued; nothing waits for them but the copying of pages, which beams need."""

    def __init__(self, config: EngineConfig, model: ModelConfig, device: torch.device) -> None:
        """Load the weights; ConfigError when that cannot be done."""
        dtype = compute_type(config.data_type, device).dtype
        matrix_dtype = torch.int8 if config.int8_mode else FLOAT8 if config.data_type == FP8 else dtype
        rotations = rotary_table(model, device)
        self._parts = GpuParts(
            model=model,
            weights=load_gpu_weights(config.checkpoint, model, dtype, device, matrix_dtype),
            cos=rotations.real.contiguous(),
            sin=rotations.imag.contiguous(),
            sampled=torch.zeros(2 * config.max_sequences, dtype=torch.int32, device=device),
            cache_indirection=torch.zeros(
                most_searches(config.max_sequences),
                MOST_BEAMS.value,
                model.context_length,
                dtype=torch.uint8,
                device=device,
            ),
            table_width=-(-model.context_length // (16 * PAGE_SIZE)) * 16,  # kernels like round numbers
        )
        self._decode = DecodeStep(self._parts, config.max_sequences)
        self._prefill = PrefillStep(self._parts)
        self._prefill_stream = torch.cuda.Stream(device)  # prefill needs the matrix units, decoding does not
        self._cache_dtype = FLOAT8 if config.kv_cache_data_type == FP8 else dtype
        self._cache = GpuKVCache(model, 1, self._cache_dtype, device)

    @property
    def device(self) -> torch.device:
        return self._parts.device

    @property
    def cache_indirection(self) -> Tensor:
        """What the decode step reads of searches, and who chooses beams writes."""
        return self._parts.cache_indirection

    @property
    def page_bytes(self) -> int:
        """Memory that one page of the KV cache takes up."""
        return GpuKVCache.page_bytes(self._parts.model, self._cache_dtype)

    def allocate(self, num_pages: int) -> None:
        """Make an empty KV cache of that size, and capture graphs over it."""
        started = time.monotonic()
        self._cache = GpuKVCache(self._parts.model, num_pages, self._cache_dtype, self.device)
        self._decode.capture(self._cache)
        self._prefill.capture(self._cache)
        log.info("CUDA graphs captured in %.1f s", time.monotonic() - started)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        """Queue a step; returns float32 logits [samples, V] of the plan's `last_rows`, until the next step."""
        self._cache.copy_pages(plan.copies)
        decoding = [group for group in plan.groups if group.num_tokens == 1]
        prefilling = [group for group in plan.groups if group.num_tokens > 1]
        num_decoding = sum(len(group.starts) for group in decoding)
        stream = torch.cuda.current_stream(self.device)
        self._prefill_stream.wait_stream(stream)
        logits: list[Tensor] = []
        if decoding:
            rows = [row for row in plan.last_rows if row < num_decoding]
            found = self._decode.run(plan, decoding, self._cache)
            logits.append(found if len(rows) == num_decoding else found[to_device(rows, self.device).long()])
        if prefilling:
            rows = [row - num_decoding for row in plan.last_rows if row >= num_decoding]
            with torch.cuda.stream(self._prefill_stream):
                logits.append(self._prefill.run(plan, prefilling, rows, self._cache))
            stream.wait_stream(self._prefill_stream)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def keep_sampled(self, tokens: Tensor) -> None:
        """Keep the tokens [samples] that were sampled from the logits of this step, for plans that refer to them."""
        self._parts.sampled[: len(tokens)] = tokens

    def measure(self, plan: StepPlan, use: Callable[[Tensor], object]) -> int:
        """Bytes of the GPU that are left when a step is computed and `use` made of its logits."""
        return memory_left(self.device, lambda: use(self.forward(plan)))

    def close(self) -> None:
        """There is no other process to end."""
