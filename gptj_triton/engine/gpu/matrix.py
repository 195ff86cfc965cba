"""Matrix products of a few rows with a large weight matrix, whose one cost is to read that matrix. Knows no model.

Weights are [N, K] with K contiguous, rows [B, K]. With up to MOST_ROWS rows these kernels read faster than cuBLAS does.
Weights of 8 bits have a scale an output column; if they are float8 the rows are, too, with a scale a row. int8 weights
are widened to the rows' type on their way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.overlap import let_next_begin, overlap, prefetch, wait_for_last

MOST_ROWS = 64
LINE_BITS = tl.constexpr(1024)  # of a line of the L2 cache


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: `outputs` columns of the result a program, `depth` of K a step, and `splits` programs that
    share K.
    """

    outputs: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


def choose_tiling(rows: int, split: bool, dtype: torch.dtype) -> Tiling:
    """The fastest tiling found on an H100 for the matrices of GPT-J 6B, with weights of type `dtype`.

    `split` if the result may come in parts, which is best where too few columns fill the GPU.
    """
    if rows == 1:
        return Tiling(outputs=4, depth=4096) if dtype.itemsize == 1 else Tiling(outputs=2, depth=2048, warps=8)
    depth, stages = 256 // dtype.itemsize, 4 if rows <= 32 else 3
    if dtype == torch.int8:
        depth, stages = 256 if split else 128, 3
    return Tiling(outputs=64, depth=depth, splits=4 if split else 1, stages=stages)


@triton.jit
def _widen(part, FAST: tl.constexpr, dtype: tl.constexpr):
    """int8 to `dtype`. FAST, to float16 alone: a byte plus 128 becomes the low byte of 1024.0, which is then taken away
    with the 128; a conversion instruction takes four times as long.
    """
    if FAST:
        wide = tl.inline_asm_elementwise(
            "{ .reg .b32 t; xor.b32 t, $2, 0x80808080; prmt.b32 $0, t, 0x64646464, 0x4140; "
            "prmt.b32 $1, t, 0x64646464, 0x4342; mov.b32 t, 0x64806480; "
            "sub.f16x2 $0, $0, t; sub.f16x2 $1, $1, t; }",
            "=&r,=&r,r",
            [part],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        ).to(dtype)
    else:
        wide = part.to(dtype)
    return wide


# A program of the first kernel computes OUTPUTS columns of the one row; of the second those of all rows, over its part
# of K.
@triton.jit
def _one_row_kernel(
    x,
    x_scales,
    weight,
    scales,
    bias,
    out,
    N,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALES: tl.constexpr,
    X_SCALES: tl.constexpr,
    FAST: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_begin(OVERLAPS)
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    columns = tl.arange(0, DEPTH)
    inside = (rows < N)[:, None]
    pointers = weight + rows[:, None].to(tl.int64) * K + columns[None, :]
    first = tl.load(pointers, mask=inside & (columns < K)[None, :], other=0.0, eviction_policy="evict_first")
    mask = (DEPTH + columns < K)[None, :]
    second = tl.load(pointers + DEPTH, mask=inside & mask, other=0.0, eviction_policy="evict_first")
    wait_for_last(OVERLAPS)
    total = tl.zeros((OUTPUTS, DEPTH), tl.float32)
    for start in tl.static_range(0, K, DEPTH):
        mask = start + columns < K
        if start == 0:
            part = first
        elif start == DEPTH:
            part = second
        else:
            part = tl.load(pointers + start, mask=inside & mask[None, :], other=0.0, eviction_policy="evict_first")
        part = _widen(part, FAST, tl.float32)
        total += part * tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if SCALES:
        result *= tl.load(scales + rows, mask=rows < N, other=0.0)
    if X_SCALES:
        result *= tl.load(x_scales)
    if BIAS:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def _few_rows_kernel(
    x,
    x_scales,
    weight,
    scales,
    bias,
    out,
    B,
    N,
    K,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALES: tl.constexpr,
    X_SCALES: tl.constexpr,
    FAST: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_begin(OVERLAPS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    steps = tl.cdiv(tl.cdiv(K, DEPTH), SPLITS)
    first = split * steps * DEPTH
    LINE: tl.constexpr = LINE_BITS // weight.dtype.element_ty.primitive_bitwidth
    lines = tl.minimum(first + tl.arange(0, (2 * DEPTH + LINE - 1) // LINE) * LINE, K - 1)  # of two steps
    prefetch(weight + tl.minimum(outputs, N - 1)[:, None].to(tl.int64) * K + lines[None, :], OVERLAPS)
    wait_for_last(OVERLAPS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for step in range(steps):
        columns = first + step * DEPTH + tl.arange(0, DEPTH)
        inside = columns < K
        part = tl.load(
            weight + outputs[:, None].to(tl.int64) * K + columns[None, :],
            mask=(outputs < N)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        values = tl.load(
            x + rows[None, :] * K + columns[:, None], mask=(rows < B)[None, :] & inside[:, None], other=0.0
        )
        if part.dtype != values.dtype:
            part = _widen(part, FAST, values.dtype)
        total = tl.dot(part, values, total, input_precision="ieee")
    if SCALES:
        total *= tl.load(scales + outputs, mask=outputs < N, other=0.0)[:, None]
    if X_SCALES:
        total *= tl.load(x_scales + rows, mask=rows < B, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[:, None]
    place = out + split.to(tl.int64) * B * N + rows[None, :].to(tl.int64) * N + outputs[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=(outputs < N)[:, None] & (rows < B)[None, :])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tiling: Tiling | None = None,
    x_scales: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """out[s] = the part s of `x @ weight.T`, to be added up over s; with one part `bias` [N] is added here.

    `x` [B, K] and `weight` [N, K] contiguous and of one type, or `weight` int8; `out` [splits, B, N] float32 or the
    type of the model. `x_scales` float32 [B] multiply the rows of the result, `scales` float32 [N] its columns.
    """
    (rows, depth), outputs = x.shape, weight.shape[0]
    tiling = tiling or choose_tiling(rows, bias is None, weight.dtype)
    assert out.shape == (tiling.splits, rows, outputs)
    assert bias is None or tiling.splits == 1
    grid = (triton.cdiv(outputs, tiling.outputs), tiling.splits)
    options = {
        "SCALES": scales is not None,
        "X_SCALES": x_scales is not None,
        "FAST": weight.dtype == torch.int8 and x.dtype == torch.float16 and x.device.type == "cuda",
        "BIAS": bias is not None,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        **overlap(x.device),
    }
    unused = x
    tensors = (
        x,
        unused if x_scales is None else x_scales,
        weight,
        unused if scales is None else scales,
        unused if bias is None else bias,
        out,
    )
    if rows == 1 and tiling.splits == 1:
        _one_row_kernel[grid](*tensors, outputs, depth, tiling.outputs, tiling.depth, **options)
    else:
        padded = max(16, triton.next_power_of_2(rows))
        _few_rows_kernel[grid](
            *tensors, rows, outputs, depth, padded, tiling.outputs, tiling.depth, tiling.splits, **options
        )
