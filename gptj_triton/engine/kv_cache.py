"""The paged KV cache of a rank as tensors. Knows layers by number, and nothing of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import UNSHARDED, Shard

PAGE_SIZE = 16  # tokens


class KVCache:
    """K and V of every layer as engine/eager reads them: [pages, heads, head_size, PAGE_SIZE] and [pages, heads,
    PAGE_SIZE, head_size] each, of the heads that a rank has.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, dtype: torch.dtype, device: torch.device, shard: Shard = UNSHARDED
    ) -> None:
        shape = (config.num_layers, num_pages, config.num_heads // shard.size)
        self.keys = _zeros((*shape, config.head_size, PAGE_SIZE), dtype, device)
        self.values = _zeros((*shape, PAGE_SIZE, config.head_size), dtype, device)

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: torch.dtype, shard: Shard = UNSHARDED) -> int:
        """Bytes that one page takes up in all layers together."""
        return 2 * config.num_layers * config.hidden_size // shard.size * PAGE_SIZE * dtype.itemsize

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
            for tensor in (self.keys, self.values):
                tensor[:, list(source_of)] = tensor[:, list(source_of.values())]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros (a masked position must be finite); on a CPU, memory that the system hands out only as it is first used."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
