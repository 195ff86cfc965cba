"""Numbers of 8 bits with scales: rows of activations to float8, weights of int8 back to the model's type.

float8 is e4m3 (4 bits of exponent, 3 of mantissa), whose largest number is 448.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.functions import gelu_tanh, scale_to_float8
from gptj_triton.engine.gpu.overlap import let_next_begin, overlap, wait_for_last


@triton.jit
def _quantize_rows_kernel(x, out, scales, K, GELU: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    let_next_begin(OVERLAPS)
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    values = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        values = gelu_tanh(values)
    scale = scale_to_float8(values)
    tl.store(out + row * K + columns, (values / scale).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x: Tensor, out: Tensor, scales: Tensor, gelu: bool = False) -> None:
    """`x` [B, K], or its GELU, to `out` [B, K] float8 times `scales` [B] float32; contiguous."""
    rows, size = x.shape
    _quantize_rows_kernel[(rows,)](
        x, out, scales, size, gelu, triton.next_power_of_2(size), num_warps=8, **overlap(x.device)
    )


@triton.jit
def _dequantize_kernel(values, stride, scales, out, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    numbers = tl.load(values + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + columns, (numbers * tl.load(scales + row)).to(out.dtype.element_ty), mask=inside)


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [N, K] int8, each row contiguous, times `scales` [N] float32, as a new tensor of type `dtype`."""
    outputs, depth = values.shape
    out = torch.empty(outputs, depth, dtype=dtype, device=values.device)
    block = 4096
    _dequantize_kernel[outputs, triton.cdiv(depth, block)](values, values.stride(0), scales, out, depth, block)
    return out
