"""Promises of a prompt's attention: what plain torch computes, of a chunk's own data, wherever chunks begin and end."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    PAGE,
    Layer,
    Shape,
    assert_cached,
    assert_near,
    copy_of,
    make_layer,
    needs_rounding,
)
from references import prefill_attention_reference, rotate_and_write_reference
from torch import Tensor

from gptj_triton.engine.gpu.prefill_attention import (
    PrefillLaunch,
    prefill_attention,
    prefill_launch,
    query_blocks,
    rotate_and_write,
)

Chunks = list[tuple[int, int]]  # first position and tokens of each


def table_of(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def where_tokens_go(layer: Layer, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """Page, slot and position of each packed token."""
    device = layer.tables.device
    tokens = [(row, at) for row, (start, count) in enumerate(chunks) for at in range(start, start + count)]
    pages = [int(layer.tables[row, at // PAGE]) for row, at in tokens]
    slots, positions = [at % PAGE for _, at in tokens], [at for _, at in tokens]
    return table_of(pages, device), table_of(slots, device), table_of(positions, device)


def attend(
    shape: Shape, layer: Layer, chunks: Chunks, projected: Tensor, launch: PrefillLaunch | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the packed chunks by the kernel and by the reference, each [T, A + F]."""
    first_rows = [sum(count for _, count in chunks[:number]) for number in range(len(chunks) + 1)]
    starts = [start for start, _ in chunks]
    launch = launch or prefill_launch(shape.dtype, projected.device)
    blocks = torch.tensor(query_blocks(starts, first_rows, launch.queries), dtype=torch.int32, device=projected.device)
    begin, bounds = table_of(starts, projected.device), table_of(first_rows, projected.device)
    result = projected.new_full((first_rows[-1], shape.attended + shape.inner), -7.0)
    expected = result.clone()
    prefill_attention(projected, layer.cache, layer.tables, begin, bounds, blocks, result, launch)
    prefill_attention_reference(projected, layer.cache, layer.tables, begin, bounds, expected)
    return result, expected


def check(shape: Shape, chunks: Chunks, device: torch.device, launch: PrefillLaunch | None = None) -> None:
    torch.manual_seed(len(chunks))
    layer = make_layer(shape, [start + count for start, count in chunks], device)
    projected = (2 * torch.randn(sum(count for _, count in chunks), shape.columns)).to(device, shape.dtype)
    result, expected = attend(shape, layer, chunks, projected, launch)
    assert_near(result, expected)
    assert (result[:, shape.attended :] == -7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 333])
def test_a_prompt_of_any_length_equals_the_reference(count: int, dtype: torch.dtype, device: torch.device) -> None:
    check(Shape(dtype=dtype), [(0, count)], device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_of_many_prompts_share_a_step(dtype: torch.dtype, device: torch.device) -> None:
    check(Shape(dtype=dtype), [(0, 17), (33, 50), (0, 1), (200, 133), (16, 16), (31, 2)], device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cache_in_float8_is_read(dtype: torch.dtype, device: torch.device) -> None:
    chunks = [(0, 17), (33, 50), (0, 1), (200, 133), (16, 16), (31, 2)]
    check(Shape(dtype=dtype, in_float8=True), chunks, device)


@pytest.mark.parametrize(("heads", "head_size"), [(3, 16), (1, 64), (2, 128), (2, 256)])
def test_every_head_size(heads: int, head_size: int, device: torch.device) -> None:
    check(Shape(heads=heads, head_size=head_size, dtype=torch.float16), [(5, 40), (0, 130)], device)


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (64, 32), (64, 128), (256, 64)])
def test_every_launch_gives_the_same_result(queries: int, keys: int, device: torch.device) -> None:
    check(Shape(dtype=torch.float16), [(5, 40), (0, 130)], device, PrefillLaunch(queries, keys, warps=4, stages=2))


def test_a_chunk_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    shape, chunks = Shape(dtype=torch.float16), [(3, 20), (30, 40), (0, 10)]
    layer = make_layer(shape, [start + count for start, count in chunks], device)
    projected = torch.randn(70, shape.columns).to(device, shape.dtype)
    together, _ = attend(shape, layer, chunks, projected)
    layer.tables = layer.tables[1:2]
    alone, _ = attend(shape, layer, chunks[1:2], projected[20:60])
    assert torch.equal(together[20:60], alone)
    assert not together.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(16, 16), (16, 4), (64, 64), (256, 64)])
@pytest.mark.parametrize("in_float8", [False, pytest.param(True, marks=needs_rounding)])
def test_tokens_are_rotated_and_cached(
    head_size: int, rotary_dim: int, dtype: torch.dtype, in_float8: bool, device: torch.device
) -> None:
    torch.manual_seed(head_size)
    shape = Shape(heads=3, head_size=head_size, rotary_dim=rotary_dim, dtype=dtype, in_float8=in_float8)
    chunks = [(0, 17), (33, 20), (100, 1)]
    layer = make_layer(shape, [start + count for start, count in chunks], device)
    pages, slots, positions = where_tokens_go(layer, chunks)
    positions[5] = -1
    projected = (2 * torch.randn(38, shape.columns)).to(device, dtype)
    cache, expected = copy_of(layer.cache), projected.clone()
    rotate_and_write(projected, cache, pages, slots, positions, layer.cos, layer.sin)
    rotate_and_write_reference(expected, layer.cache, pages, slots, positions, layer.cos, layer.sin)
    assert_near(projected, expected)
    assert_cached(cache, layer.cache)


def test_blocks_cover_every_token_once_and_the_longest_context_comes_first() -> None:
    blocks = query_blocks([0, 1000, 8], [0, 100, 130, 258], 64)
    assert blocks == [(1, 100), (2, 194), (0, 64), (2, 130), (0, 0)]
