"""What the attention's tests share: random caches with scattered pages, rotations, and how near is near."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 16
CONTEXT = 512
POISON = float("nan")


@dataclass
class Shape:
    """A rank's part of a layer."""

    heads: int = 2
    head_size: int = 32
    rotary_dim: int = 16
    inner: int = 80
    dtype: torch.dtype = torch.float32

    @property
    def attended(self) -> int:
        return self.heads * self.head_size

    @property
    def columns(self) -> int:
        return 3 * self.attended + self.inner


@dataclass
class Layer:
    """A cache whose pages lie scattered, `tables` [rows, P] that lead to them, and the rotations."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    cos: Tensor
    sin: Tensor


def make_layer(shape: Shape, contexts: list[int], device: torch.device) -> Layer:
    """Pages for `contexts` tokens a row. Slots behind a context and pages of nobody hold NaN, table entries behind it
    lead nowhere.
    """
    needed = [-(-context // PAGE) for context in contexts]
    total = sum(needed) + 3
    keys = torch.randn(total, shape.heads, shape.head_size, PAGE)
    values = torch.randn(total, shape.heads, PAGE, shape.head_size)
    order = torch.randperm(total).tolist()
    tables = torch.full((len(contexts), max(needed) + 1), 1 << 30, dtype=torch.int32)
    for row, (context, count) in enumerate(zip(contexts, needed, strict=True)):
        pages = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(pages, dtype=torch.int32)
        if context % PAGE:
            keys[pages[-1], :, :, context % PAGE :] = POISON
            values[pages[-1], :, context % PAGE :] = POISON
    keys[order], values[order] = POISON, POISON
    angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** -(torch.arange(0, shape.rotary_dim, 2) / shape.rotary_dim))
    return Layer(
        keys.to(device, shape.dtype),
        values.to(device, shape.dtype),
        tables.to(device),
        angles.cos().to(device),
        angles.sin().to(device),
    )


def assert_near(result: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of their type; NaN where NaN is expected."""
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
