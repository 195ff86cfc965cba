"""What the attention's tests share: random caches with scattered pages, rotations, and how near is near."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from references import keys_of, to_float8, values_of
from torch import Tensor

from gptj_triton.engine.gpu.kv_cache import LayerCache

PAGE = 16
CONTEXT = 512
POISON = float("nan")
needs_rounding = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the interpreter rounds to half of the next power of two instead of to it"
)


@dataclass
class Shape:
    """A rank's part of a layer."""

    heads: int = 2
    head_size: int = 32
    rotary_dim: int = 16
    inner: int = 80
    dtype: torch.dtype = torch.float32
    in_float8: bool = False  # the cache

    @property
    def attended(self) -> int:
        return self.heads * self.head_size

    @property
    def columns(self) -> int:
        return 3 * self.attended + self.inner


@dataclass
class Layer:
    """A cache whose pages lie scattered, `tables` [rows, P] that lead to them, and the rotations."""

    cache: LayerCache
    tables: Tensor
    cos: Tensor
    sin: Tensor


def make_layer(shape: Shape, contexts: list[int], device: torch.device) -> Layer:
    """Pages for `contexts` tokens a row. Slots behind a context and pages of nobody hold NaN, table entries behind it
    lead nowhere.
    """
    needed = [-(-context // PAGE) for context in contexts]
    total = sum(needed) + 3
    keys = torch.randn(total, shape.heads, PAGE, shape.head_size)
    values = torch.randn(total, shape.heads, PAGE, shape.head_size)
    order = torch.randperm(total).tolist()
    tables = torch.full((len(contexts), max(needed) + 1), 1 << 30, dtype=torch.int32)
    for row, (context, count) in enumerate(zip(contexts, needed, strict=True)):
        pages = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(pages, dtype=torch.int32)
        if context % PAGE:
            keys[pages[-1], :, context % PAGE :] = POISON
            values[pages[-1], :, context % PAGE :] = POISON
    keys[order], values[order] = POISON, POISON
    angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** -(torch.arange(0, shape.rotary_dim, 2) / shape.rotary_dim))
    cache = LayerCache(keys.to(device, shape.dtype), values.to(device, shape.dtype))
    if shape.in_float8:
        (keys, key_scales), (values, value_scales) = to_float8(cache.keys), to_float8(cache.values)
        cache = LayerCache(keys, values, key_scales, value_scales)
    return Layer(
        cache,
        tables.to(device),
        angles.cos().to(device),
        angles.sin().to(device),
    )


def copy_of(cache: LayerCache) -> LayerCache:
    """The same numbers in tensors of their own."""
    return LayerCache(*(None if tensor is None else tensor.clone() for tensor in cache))  # type: ignore[arg-type]


def assert_same(cache: LayerCache, expected: LayerCache) -> None:
    """Bit for bit, NaN where NaN is expected."""
    for found, wanted in ((cache.keys, expected.keys), (cache.values, expected.values)):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def assert_cached(cache: LayerCache, expected: LayerCache) -> None:
    """K up to the rounding of its rotation, V bit for bit; in float8 a few numbers of both may be another's neighbour,
    as divisions round in several ways.
    """
    if cache.key_scales is None:
        assert_near(cache.keys, expected.keys)
        torch.testing.assert_close(cache.values, expected.values, rtol=0, atol=0, equal_nan=True)
        return
    for found, wanted in ((keys_of(cache), keys_of(expected)), (values_of(cache), values_of(expected))):
        torch.testing.assert_close(found, wanted, rtol=2**-3, atol=2e-2, equal_nan=True)
        assert ((found - wanted).abs() > 1e-3 * wanted.abs() + 1e-3).float().mean() < 0.01


def assert_near(result: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of their type; NaN where NaN is expected."""
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
