"""Promises of the products with a large matrix and of the residual stream: what plain torch computes, row by row."""

from __future__ import annotations

import pytest
import torch
from references import add_norm_reference, embed_reference, linear_reference

from gptj_triton.engine.gpu.matrix import Tiling, choose_tiling, linear
from gptj_triton.engine.gpu.residual import add_norm, embed

SHAPES = [(1, 33, 96), (1, 64, 2500), (2, 40, 48), (16, 33, 64), (17, 64, 130)]  # B, N, K
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


def numbers(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_a_product_is_that_of_plain_torch(
    rows: int, outputs: int, depth: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = numbers(rows, depth, device=device, dtype=dtype), numbers(outputs, depth, device=device, dtype=dtype)
    bias = numbers(outputs, device=device, dtype=dtype)
    expected = linear_reference(x, weight, bias)
    out = torch.full((1, rows, outputs), torch.nan, device=device)
    linear(x, weight, bias, out)
    assert (out[0] - expected).abs().max() < TOLERANCE[dtype] * depth**0.5


@pytest.mark.parametrize("splits", [1, 2, 4, 7])
@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_the_parts_of_a_product_add_up(rows: int, outputs: int, depth: int, splits: int, device: torch.device) -> None:
    x, weight = numbers(rows, depth, device=device), numbers(outputs, depth, device=device)
    out = torch.full((splits, rows, outputs), torch.nan, device=device)
    linear(x, weight, None, out, Tiling(outputs=16, depth=32, splits=splits))
    assert (out.sum(0) - linear_reference(x, weight, None)).abs().max() < 1e-4 * depth**0.5


def test_a_row_of_a_product_does_not_depend_on_the_others(device: torch.device) -> None:
    x, weight = numbers(5, 96, device=device), numbers(40, 96, device=device)
    outs = []
    for rows in (x, torch.cat((x[:2], x[2:] * 1e3))):
        tiling = choose_tiling(5, True, torch.float32)
        out = torch.empty(tiling.splits, 5, 40, device=device)
        linear(rows, weight, None, out)
        outs.append(out[:, :2])
    assert torch.equal(*outs)


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("size", [48, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_residual_stream_is_added_to_and_normed(
    size: int, parts: int, dtype: torch.dtype, device: torch.device
) -> None:
    residual = 3 * numbers(4, size, device=device) + 1
    update = numbers(parts, 4, size, device=device, dtype=dtype) if parts else None
    bias, weight, norm_bias = numbers(3, size, device=device, dtype=dtype)
    expected, expected_norm = add_norm_reference(residual, update, bias, weight, norm_bias, 1e-5)
    out = torch.empty(4, size, dtype=dtype, device=device)
    add_norm(residual, update, bias, weight, norm_bias, 1e-5, out)
    assert (residual - expected).abs().max() < 1e-5
    assert (out - expected_norm).abs().max() < TOLERANCE[dtype]


def test_a_token_that_was_just_sampled_need_not_pass_through_the_host(device: torch.device) -> None:
    embedding = numbers(50, 40, device=device)
    tokens = torch.tensor([3, -1, 49, -3], dtype=torch.int32, device=device)
    sampled = torch.tensor([7, 8, 9], dtype=torch.int32, device=device)
    out = torch.empty(4, 40, device=device)
    embed(tokens, sampled, embedding, out)
    assert torch.equal(out, embedding[[3, 7, 49, 9]])
    assert torch.equal(out, embed_reference(tokens, sampled, embedding))
