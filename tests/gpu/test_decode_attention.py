"""Promises of a decode step's attention: what plain torch computes, of a row's own data, and nothing for dead rows."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    Layer,
    Shape,
    assert_cached,
    assert_near,
    assert_same,
    copy_of,
    make_layer,
    needs_rounding,
)
from references import decode_attention_reference
from torch import Tensor

from gptj_triton.engine.gpu.decode_attention import (
    DecodeLaunch,
    decode_attention,
    decode_splits,
    decode_workspace_size,
)

CONTEXTS = [1, 15, 16, 17, 100, 333]
FEW_SPLITS = DecodeLaunch(programs=48)


def decode(
    shape: Shape, layer: Layer, positions: list[int], projected: Tensor, launch: DecodeLaunch | None = None
) -> tuple[Tensor, Layer]:
    """Activations, and the layer with its cache as it stands after, of a step on a copy of that layer."""
    device, rows = projected.device, len(positions)
    layer = Layer(copy_of(layer.cache), layer.tables, layer.cos, layer.sin)
    activations = torch.full((rows, shape.attended + shape.inner), -7.0, dtype=shape.dtype, device=device)
    size = decode_workspace_size(rows, shape.heads, shape.head_size, launch)
    workspace = torch.full((size + 5,), float("nan"), device=device)
    where = torch.tensor(positions, dtype=torch.int32, device=device)
    decode_attention(
        projected, layer.cache, layer.tables, where, layer.cos, layer.sin, activations, workspace, launch=launch
    )
    return activations, layer


def check(shape: Shape, contexts: list[int], device: torch.device, launch: DecodeLaunch | None = None) -> None:
    """Rows of these contexts, their new token included (0: a dead row), against the reference."""
    torch.manual_seed(len(contexts))
    layer = make_layer(shape, contexts, device)
    positions = [context - 1 for context in contexts]
    projected = (2 * torch.randn(len(contexts), shape.columns)).to(device, shape.dtype)
    before = projected.clone()
    activations, after = decode(shape, layer, positions, projected, launch)

    expected = torch.full_like(activations, -7.0)
    where = torch.tensor(positions, dtype=torch.int32, device=device)
    decode_attention_reference(projected, layer.cache, layer.tables, where, layer.cos, layer.sin, expected)
    assert torch.equal(projected, before)
    assert_near(activations, expected)
    assert_cached(after.cache, layer.cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_row_of_any_context_equals_the_reference(context: int, dtype: torch.dtype, device: torch.device) -> None:
    check(Shape(dtype=dtype), [context], device)


@needs_rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_cache_in_float8_is_read_and_written(context: int, dtype: torch.dtype, device: torch.device) -> None:
    check(Shape(dtype=dtype, in_float8=True), [context, 0, 40], device)


@needs_rounding
@pytest.mark.parametrize("head_size", [16, 64, 256])
def test_float8_with_every_head_size(head_size: int, device: torch.device) -> None:
    check(Shape(heads=3, head_size=head_size, dtype=torch.float16, in_float8=True), [37, 2, 200], device, FEW_SPLITS)


@pytest.mark.parametrize(("head_size", "rotary_dim"), [(16, 16), (16, 4), (64, 32), (256, 64), (256, 256)])
def test_every_head_size_and_rotary_dim(head_size: int, rotary_dim: int, device: torch.device) -> None:
    shape = Shape(heads=3, head_size=head_size, rotary_dim=rotary_dim, dtype=torch.float16)
    check(shape, [37, 2], device, FEW_SPLITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_many_lengths_and_dead_ones_share_a_step(dtype: torch.dtype, device: torch.device) -> None:
    check(Shape(dtype=dtype), [17, 0, 100, 1, 333, 0, 16, 0], device, FEW_SPLITS)


@pytest.mark.parametrize(
    "launch",
    [
        DecodeLaunch(programs=1),
        DecodeLaunch(programs=1, tile_pages=1, stages=2),
        DecodeLaunch(programs=64, tile_pages=4, stages=3, combined=64),
        DecodeLaunch(programs=64, least_pages=4, tile_pages=8, warps=8, columns=32),
        DecodeLaunch(most_splits=32),
    ],
)
def test_every_launch_gives_the_same_result(launch: DecodeLaunch, device: torch.device) -> None:
    check(Shape(), [65, 130, 0, 250], device, launch)


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    shape, contexts = Shape(dtype=torch.float16), [100, 17, 333, 64]
    layer = make_layer(shape, contexts, device)
    projected = torch.randn(4, shape.columns).to(device, shape.dtype)
    first, _ = decode(shape, layer, [99, 16, 332, 63], projected)
    projected[[0, 2]] = float("nan")
    second, _ = decode(shape, layer, [3, 16, -1, 63], projected)
    assert torch.equal(first[[1, 3]], second[[1, 3]])
    assert not first.isnan().any()


def test_a_bucket_of_dead_rows_touches_nothing(device: torch.device) -> None:
    shape = Shape()
    layer = make_layer(shape, [40, 40], device)
    activations, after = decode(shape, layer, [-1, -1], torch.randn(2, shape.columns, device=device))
    assert (activations == -7.0).all()
    assert_same(after.cache, layer.cache)


@pytest.mark.parametrize("rows", [1, 8, 24, 64, 256])
def test_splits_fill_the_gpu_at_every_bucket_and_no_more(rows: int) -> None:
    splits = decode_splits(rows, 16)
    assert rows * 16 * splits >= DecodeLaunch().programs
    assert splits == 1 or rows * 16 * splits // 2 < DecodeLaunch().programs
