"""The paged KV cache of a rank as tensors. Knows layers by number, and nothing of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import UNSHARDED, Shard
from gptj_triton.engine.device import FLOAT8

PAGE_SIZE = 16  # tokens


class LayerCache(NamedTuple):
    """K and V of one layer, [pages, heads, head_size, PAGE_SIZE] and [pages, heads, PAGE_SIZE, head_size].

    In float8 each token and head has a scale, by which its numbers are to be multiplied: float32 [pages, heads,
    PAGE_SIZE] each. Otherwise there are none.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class KVCache:
    """K and V of every layer, of the heads that a rank has: LayerCache's tensors with an axis of layers in front."""

    def __init__(
        self, config: ModelConfig, num_pages: int, dtype: torch.dtype, device: torch.device, shard: Shard = UNSHARDED
    ) -> None:
        shape = (config.num_layers, num_pages, config.num_heads // shard.size)
        self.keys = _zeros((*shape, config.head_size, PAGE_SIZE), dtype, device)
        self.values = _zeros((*shape, PAGE_SIZE, config.head_size), dtype, device)
        self.scales: list[Tensor] = []  # of K and of V, [layers, pages, heads, PAGE_SIZE]
        if dtype == FLOAT8:
            self.scales = [_zeros((*shape, PAGE_SIZE), torch.float32, device) for _ in range(2)]

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: torch.dtype, shard: Shard = UNSHARDED) -> int:
        """Bytes that one page takes up in all layers together."""
        vector = config.head_size * dtype.itemsize + (torch.float32.itemsize if dtype == FLOAT8 else 0)
        return 2 * config.num_layers * config.num_heads // shard.size * PAGE_SIZE * vector

    def layer(self, number: int) -> LayerCache:
        """The tensors of one layer."""
        return LayerCache(self.keys[number], self.values[number], *(scales[number] for scales in self.scales))

    def write(self, layer: int, pages: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store K and V, [T, heads, head_size] each, at `pages` and `slots`, int64 [T] each."""
        self.keys[layer][pages, :, :, slots] = key
        self.values[layer][pages, :, slots] = value

    def copy_pages(self, pairs: SequenceOf[tuple[int, int]]) -> None:
        """Copy the content of pages, (from, to) each, in all layers.

        A page is the target twice where who took it first was preempted in the same step: the last copy counts.
        """
        if pairs:
            source_of = {target: source for source, target in pairs}
            for tensor in (self.keys, self.values, *self.scales):
                content = tensor.view(torch.uint8)  # torch cannot index float8
                content[:, list(source_of)] = content[:, list(source_of.values())]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros (a masked position must be finite); on a CPU, memory that the system hands out only as it is first used."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
