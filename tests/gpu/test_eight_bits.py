"""Promises of weights and activations in 8 bits: near what they stand for, and products near those of plain torch."""

from __future__ import annotations

import pytest
import torch
from attention_cases import needs_rounding
from references import add_norm_reference, linear_reference
from torch.nn import functional

from gptj_triton.engine.device import FLOAT8
from gptj_triton.engine.gpu.matrix import Tiling, linear
from gptj_triton.engine.gpu.products import Rows, block_update, float8_rows, product, product_into
from gptj_triton.engine.gpu.quantize import dequantize
from gptj_triton.engine.gpu.residual import add_norm
from gptj_triton.engine.gpu.weights import Matrix, quantize

# Half of the distance between neighbours, as a part of the number itself, and of the largest number.
RELATIVE, ABSOLUTE = {FLOAT8: 2**-4, torch.int8: 0.0}, {FLOAT8: 2**-10 / 448, torch.int8: 0.5 / 127}
SHAPES = [(1, 33, 96), (1, 64, 2500), (2, 40, 48), (16, 33, 64), (17, 64, 130)]  # B, N, K
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="cuBLAS needs a GPU")


def numbers(*shape: int, device: torch.device, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def exact(rows: Rows) -> torch.Tensor:
    """What the rows stand for, float32."""
    return rows.values.float() if rows.scales is None else rows.values.float() * rows.scales[:, None]


def weights(matrix: Matrix) -> torch.Tensor:
    """What the matrix stands for, float32 [N, K]."""
    return matrix.values.T.float() if matrix.scales is None else matrix.values.T.float() * matrix.scales[:, None]


@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
def test_a_weight_is_as_near_as_eight_bits_come(dtype: torch.dtype, device: torch.device) -> None:
    weight = numbers(5000, 48, device=device) * torch.logspace(-3, 2, 5000, device=device)[:, None]
    weight[7] = 0.0
    matrix = quantize(weight.T, dtype)
    assert matrix.dtype == dtype
    assert matrix.values.T.is_contiguous()
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    allowed = weight.float().abs() * RELATIVE[dtype] + largest * ABSOLUTE[dtype]
    assert ((weights(matrix) - weight.float()).abs() <= allowed * 1.001).all()


@pytest.mark.parametrize("size", [48, 64, 300])
def test_rows_that_float8_can_hold_are_kept(size: int, device: torch.device) -> None:
    values = (7 * numbers(4, size, device=device)).to(FLOAT8)
    values[:, -1] = 448.0
    factors = torch.tensor([0.25, 1.0, 8.0, 2**-12], device=device)
    rows = float8_rows((values.float() * factors[:, None]).half())
    assert torch.equal(rows.values.float(), values.float())
    assert rows.scales is not None
    assert torch.equal(rows.scales, factors)


@needs_rounding
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("size", [48, 64, 300])
def test_a_row_is_as_near_as_float8_comes(size: int, gelu: bool, device: torch.device) -> None:
    x = (
        numbers(4, size, device=device)
        * torch.tensor([1e-3, 1.0, 30.0, 0.0], device=device, dtype=torch.float16)[:, None]
    )
    expected = functional.gelu(x.float(), approximate="tanh") if gelu else x.float()
    found = exact(float8_rows(x, gelu))
    largest = expected.abs().amax(dim=1, keepdim=True)
    assert (
        (found - expected).abs() <= 1.01 * (RELATIVE[FLOAT8] * expected.abs() + ABSOLUTE[FLOAT8] * largest) + 1e-6
    ).all()


def test_int8_weights_become_the_models_type(device: torch.device) -> None:
    matrix = quantize(numbers(33, 5000, device=device).T, torch.int8).rows(100)
    assert matrix.scales is not None
    found = dequantize(matrix.values.T, matrix.scales, torch.float16)
    assert torch.equal(found, weights(matrix).half())


@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_a_product_is_that_of_plain_torch(
    rows: int, outputs: int, depth: int, dtype: torch.dtype, device: torch.device
) -> None:
    given, bias = numbers(rows, depth, device=device), numbers(outputs, device=device)
    matrix = quantize(numbers(outputs, depth, device=device).T, dtype)
    x = float8_rows(given) if dtype == FLOAT8 else Rows(given)
    expected = linear_reference(exact(x), weights(matrix), bias)
    out = torch.full((1, rows, outputs), torch.nan, device=device)
    product_into(out, x, matrix, bias)
    assert (out[0] - expected).abs().max() < 4e-3 * depth**0.5


@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
@pytest.mark.parametrize("splits", [1, 4, 7])
def test_the_parts_of_a_product_add_up(splits: int, dtype: torch.dtype, device: torch.device) -> None:
    matrix = quantize(numbers(33, 130, device=device).T, dtype)
    given = numbers(17, 130, device=device)
    x = float8_rows(given) if dtype == FLOAT8 else Rows(given)
    out = torch.full((splits, 17, 33), torch.nan, device=device)
    tiling = Tiling(outputs=16, depth=32, splits=splits)
    linear(x.values, matrix.values.T, None, out, tiling, x_scales=x.scales, scales=matrix.scales)
    assert (out.sum(0) - linear_reference(exact(x), weights(matrix), None)).abs().max() < 4e-3 * 130**0.5


@needs_rounding
def test_the_residual_stream_is_normed_to_float8(device: torch.device) -> None:
    residual = 3 * numbers(4, 300, device=device, dtype=torch.float32) + 1
    bias, weight, norm_bias = numbers(3, 300, device=device)
    _, expected = add_norm_reference(residual, None, bias, weight, norm_bias, 1e-5)
    rows = Rows(torch.empty(4, 300, dtype=FLOAT8, device=device), torch.empty(4, device=device))
    add_norm(residual, None, bias, weight, norm_bias, 1e-5, rows.values, rows.scales)
    largest = expected.abs().amax(dim=1, keepdim=True)
    allowed = RELATIVE[FLOAT8] * expected.abs() + ABSOLUTE[FLOAT8] * largest
    assert ((exact(rows) - expected).abs() <= 1.01 * allowed + 1e-5).all()


@needs_gpu
@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
@pytest.mark.parametrize("rows", [65, 130, 193, 700])
def test_many_rows_are_multiplied_as_few_are(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    given, bias = numbers(rows, 320, device=device), numbers(96, device=device)
    matrix = quantize(numbers(96, 320, device=device).T, dtype)
    x = float8_rows(given) if dtype == FLOAT8 else Rows(given)
    expected = linear_reference(exact(x), weights(matrix), bias)
    out = torch.full((1, rows, 96), torch.nan, device=device, dtype=torch.float16)
    product_into(out, x, matrix, bias)
    for found in (out[0], product(x, matrix, bias)):
        assert (found - expected).norm() < 4e-3 * expected.norm()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, FLOAT8, torch.int8])
def test_a_block_adds_what_attention_and_mlp_give(dtype: torch.dtype, device: torch.device) -> None:
    normed, attention = numbers(70, 64, device=device), numbers(70, 64, device=device) / 8
    in_bias = numbers(256, device=device)
    given = numbers(256, 64, device=device) / 8, numbers(64, 320, device=device) / 18
    in_weight, out_weight = (Matrix(each.T) if dtype == torch.float16 else quantize(each.T, dtype) for each in given)
    x = float8_rows(normed) if dtype == FLOAT8 else Rows(normed)
    inner = functional.gelu(linear_reference(normed, given[0], in_bias), approximate="tanh")
    expected = linear_reference(torch.cat((attention.float(), inner), dim=1), given[1], None)
    found = block_update(x, in_weight, in_bias, attention, out_weight).float().sum(0)
    assert (found - expected).norm() < (6e-2 if dtype == FLOAT8 else 2e-2) * expected.norm()
