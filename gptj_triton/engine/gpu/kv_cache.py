"""The paged KV cache as the kernels read it, in 16 bits a number or in float8. Knows layers by number."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.device import FLOAT8
from gptj_triton.engine.gpu.transfer import to_device
from gptj_triton.engine.kv_cache import PAGE_SIZE


class LayerCache(NamedTuple):
    """K and V of one layer, [pages, heads, PAGE_SIZE, head_size] each.

    In float8 each token and head has a scale, by which its numbers are to be multiplied: float32 [pages, heads,
    PAGE_SIZE] each. Otherwise there are none.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class GpuKVCache:
    """K and V of all layers."""

    def __init__(self, config: ModelConfig, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, num_pages, config.num_heads, PAGE_SIZE, config.head_size)
        # Zeros, as a masked position must be finite.
        self._tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
        if dtype == FLOAT8:
            self._tensors += [torch.zeros(shape[:-1], device=device) for _ in range(2)]

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one page takes up in all layers together."""
        vector = config.head_size * dtype.itemsize + (torch.float32.itemsize if dtype == FLOAT8 else 0)
        return 2 * config.num_layers * config.num_heads * PAGE_SIZE * vector

    def layer(self, number: int) -> LayerCache:
        """The tensors of one layer."""
        return LayerCache(*(tensor[number] for tensor in self._tensors))

    def copy_pages(self, pairs: SequenceOf[tuple[int, int]]) -> None:
        """Copy the content of pages, (from, to) each, in all layers; nothing waits for it.

        A page is the target twice where who took it first was preempted in the same step: the last copy counts.
        """
        if not pairs:
            return
        last = {target: source for source, target in pairs}
        targets, sources = to_device([[*last], [*last.values()]], self._tensors[0].device).long()
        for layer in (layer for tensor in self._tensors for layer in tensor):  # one by one, as each needs memory
            content = layer.view(torch.uint8)  # torch cannot index float8
            content.index_copy_(0, targets, content.index_select(0, sources))
