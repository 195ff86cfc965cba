"""The residual stream: embeddings begin it, each block's result is added to it, and the next LayerNorm taken of it.

It is float32 whatever the type of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.functions import scale_to_float8
from gptj_triton.engine.gpu.overlap import let_next_begin, overlap, wait_for_last


@triton.jit
def _embed_kernel(tokens, sampled, embedding, out, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    if token < 0:
        token = tl.load(sampled - 1 - token).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    values = tl.load(embedding + token * H + columns, mask=inside, other=0.0)
    tl.store(out + row * H + columns, values.to(tl.float32), mask=inside)


def embed(tokens: Tensor, sampled: Tensor, embedding: Tensor, out: Tensor) -> None:
    """Rows of `embedding` [V, H] to `out` [B, H] float32, by `tokens` [B] int32: an id, or -1 - i for the id at
    `sampled[i]` (int32), which the host need not know.
    """
    rows, size = out.shape
    _embed_kernel[(rows,)](tokens, sampled, embedding, out, size, triton.next_power_of_2(size), num_warps=4)


@triton.jit(do_not_specialize=["rows"])
def _add_norm_kernel(
    residual,
    update,
    bias,
    weight,
    norm_bias,
    out,
    scales,
    rows,
    H,
    eps,
    PARTS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_begin(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    before = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(OVERLAPS)
    x = tl.load(residual + row * H + columns, mask=inside, other=0.0)
    if PARTS > 0:
        x += before
        for part in tl.static_range(PARTS):
            x += tl.load(update + (part * rows + row) * H + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + row * H + columns, x, mask=inside)
    mean = tl.sum(x, axis=0) / H
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / H + eps)
    normed = centred * scale * factor + shift
    if QUANTIZE:
        norm_scale = scale_to_float8(normed)
        normed /= norm_scale
        tl.store(scales + row, norm_scale)
    tl.store(out + row * H + columns, normed.to(out.dtype.element_ty), mask=inside)


def add_norm(
    residual: Tensor,
    update: Tensor | None,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """residual += bias + the sum of the parts of `update`, then out = LayerNorm(residual).

    `residual` [B, H] float32; `update` [parts, B, H] of any type, None where there is nothing to add (`bias` neither);
    `bias`, `weight`, `norm_bias` [H]; `out` [B, H]. With `scales` [B] float32, `out` is float8 and to be multiplied by
    them.
    """
    rows, size = residual.shape
    parts = 0 if update is None else update.shape[0]
    _add_norm_kernel[(rows,)](
        residual,
        residual if update is None else update,
        bias,
        weight,
        norm_bias,
        out,
        residual if scales is None else scales,
        rows,
        size,
        eps,
        parts,
        scales is not None,
        triton.next_power_of_2(size),
        num_warps=8,
        **overlap(residual.device),
    )
