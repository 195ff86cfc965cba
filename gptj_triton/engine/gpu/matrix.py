"""Matrix products of a few rows with a large weight matrix, whose one cost is to read that matrix. Knows no model.

Weights are [N, K] with K contiguous, rows [B, K]. With up to MOST_ROWS rows these kernels read faster than cuBLAS does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.overlap import let_next_begin, overlap, prefetch, wait_for_last

MOST_ROWS = 64
LINE = tl.constexpr(64)  # numbers of two bytes in a line of the L2 cache


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
    """The fastest tiling found on an H100 for the matrices of GPT-J 6B.

    `split` if the result may come in parts, which is best where too few columns fill the GPU.
    """
    if rows == 1:
        return Tiling(outputs=2, depth=2048, warps=8)
    depth, stages = 256 // dtype.itemsize, 4 if rows <= 32 else 3
    return Tiling(outputs=64, depth=depth, splits=4 if split else 1, stages=stages)


# A program of the first kernel computes OUTPUTS columns of the one row; of the second those of all rows, over its part
# of K.
@triton.jit
def _one_row_kernel(
    x,
    weight,
    bias,
    out,
    N,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
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
        total += part.to(tl.float32) * tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if BIAS:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def _few_rows_kernel(
    x,
    weight,
    bias,
    out,
    B,
    N,
    K,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_begin(OVERLAPS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    steps = tl.cdiv(tl.cdiv(K, DEPTH), SPLITS)
    first = split * steps * DEPTH
    lines = tl.minimum(first + tl.arange(0, 2 * DEPTH // LINE) * LINE, K - 1)  # of two steps
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
        total = tl.dot(part, values, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[:, None]
    place = out + split.to(tl.int64) * B * N + rows[None, :].to(tl.int64) * N + outputs[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=(outputs < N)[:, None] & (rows < B)[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tiling: Tiling | None = None) -> None:
    """out[s] = the part s of `x @ weight.T`, to be added up over s; with one part `bias` [N] is added here.

    `x` [B, K] and `weight` [N, K] contiguous; `out` [splits, B, N] float32 or the type of `x`.
    """
    (rows, depth), outputs = x.shape, weight.shape[0]
    tiling = tiling or choose_tiling(rows, bias is None, x.dtype)
    assert out.shape == (tiling.splits, rows, outputs)
    assert bias is None or tiling.splits == 1
    grid = (triton.cdiv(outputs, tiling.outputs), tiling.splits)
    options = {"BIAS": bias is not None, "num_warps": tiling.warps, "num_stages": tiling.stages, **overlap(x.device)}
    given = bias if bias is not None else x
    if rows == 1 and tiling.splits == 1:
        _one_row_kernel[grid](x, weight, given, out, outputs, depth, tiling.outputs, tiling.depth, **options)
    else:
        padded = max(16, triton.next_power_of_2(rows))
        _few_rows_kernel[grid](
            x,
            weight,
            given,
            out,
            rows,
            outputs,
            depth,
            padded,
            tiling.outputs,
            tiling.depth,
            tiling.splits,
            **options,
        )
