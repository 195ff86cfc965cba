"""Attention of a decode step: one new token a row, its context read through page tables. Knows no layers or batches.

B rows of a bucket, of which the dead ones have position -1; D head size, a power of two from 16 up; A = heads * D and F
the inner size, of this rank; PAGE tokens a page. Two kernels: the first reads each row's K and V once, cut into splits
that run side by side (Dao et al., 2023, Flash-Decoding), the second adds the splits up and applies GELU on the way.
Rows that are beams of a search go through a kernel of their own instead of the first (see beam_attention).
Grids and shapes depend on the bucket alone, and no result on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.beam_attention import attend_beams, splits_of_search, working_splits
from gptj_triton.engine.gpu.beam_rows import BeamRows
from gptj_triton.engine.gpu.functions import LOG2_E, LOWEST, gelu_tanh, scale_to_float8
from gptj_triton.engine.gpu.kv_cache import LayerCache
from gptj_triton.engine.gpu.overlap import let_next_begin, overlap, wait_for_last


class DecodeLaunch(NamedTuple):
    """How the kernels are launched; what stands here was fastest on an H100 for the heads of GPT-J 6B.

    `programs` is how many of the first kernel a bucket aims at (splits are made to reach it, `most_splits` at most),
    and no split takes less than `least_pages`; `tile_pages` pages are in registers at once, `stages` - 1 tiles on their
    way to shared memory (with 1 stage loads go straight to registers). `columns` and `combined` are elements a program
    of the second: of GELU, and of partial results.
    """

    programs: int = 1024
    most_splits: int = 64
    least_pages: int = 2
    tile_pages: int = 1
    warps: int = 1
    stages: int = 2
    columns: int = 1024
    combined: int = 4096
    combine_warps: int = 4


def decode_launch(rows: int) -> DecodeLaunch:
    """How `decode_attention` is launched for a bucket, by default."""
    return DecodeLaunch(least_pages=1, warps=2) if rows == 1 else DecodeLaunch()


def decode_splits(rows: int, heads: int, launch: DecodeLaunch | None = None, with_beams: bool = False) -> int:
    """Splits of a context in a bucket of `rows`: a power of two. `with_beams`: four rows are taken for one search."""
    launch = launch or decode_launch(rows)
    if with_beams:
        rows = max(1, rows // 4)
    wanted = triton.next_power_of_2(-(-launch.programs // (rows * heads)))
    return int(min(wanted, launch.most_splits))


def decode_workspace_size(rows: int, heads: int, head_size: int, launch: DecodeLaunch | None = None) -> int:
    """float32 numbers that `decode_attention` needs for its partial results; a larger workspace does as well."""
    return rows * heads * decode_splits(rows, heads, launch, with_beams=True) * (head_size + 2)


def decode_attention(
    projected: Tensor,
    cache: LayerCache,
    tables: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    activations: Tensor,
    workspace: Tensor,
    beams: BeamRows | None = None,
    launch: DecodeLaunch | None = None,
) -> None:
    """Write each live row's K and V to the cache, and its attention and GELU to `activations` [B, A + F].

    `projected` [B, 3A + F], contiguous: q, k, v, fc_in, not yet rotated, and left so. All of `cache` is contiguous.
    `tables` int32 [B, P]: pages in order, of which no entry is read beyond the row's position. `positions` int32 [B].
    `cos`, `sin` float32 [context, rotary_dim / 2]. `workspace` float32, `decode_workspace_size` numbers or more. A dead
    row's activations stay as they are, and nothing of it is read. `beams` says which rows are beams, None: there are
    none.
    """
    rows, (_, heads, page, head_size) = projected.shape[0], cache.keys.shape
    launch = launch or decode_launch(rows)
    attended = heads * head_size
    inner = projected.shape[1] - 3 * attended
    splits = decode_splits(rows, heads, launch, beams is not None)
    parts = rows * heads * splits
    partial, maxima, sums = workspace[: parts * (head_size + 2)].split((parts * head_size, parts, parts))
    _attend_kernel[rows, heads, splits](
        projected,
        projected.stride(0),
        *cache,
        tables,
        tables.stride(0),
        positions,
        beams.inputs if beams else None,
        cos,
        sin,
        partial,
        maxima,
        sums,
        HEADS=heads,
        D=head_size,
        PAGE=page,
        ROTARY=2 * cos.shape[1],
        SPLITS=splits,
        LEAST_PAGES=launch.least_pages,
        TILE_PAGES=launch.tile_pages,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **overlap(projected.device),
    )
    if beams:
        attend_beams(
            projected, cache, tables, positions, beams, cos, sin, (partial, maxima, sums), splits, launch.least_pages
        )
    part = min(head_size, max(16, launch.combined // splits))
    attended_blocks = attended // part
    _combine_and_gelu_kernel[rows, attended_blocks + triton.cdiv(inner, launch.columns)](
        projected,
        projected.stride(0),
        positions,
        beams.inputs if beams else None,
        partial,
        maxima,
        sums,
        activations,
        activations.stride(0),
        inner,
        rows,
        HEADS=heads,
        D=head_size,
        PAGE=page,
        SPLITS=splits,
        LEAST_PAGES=launch.least_pages,
        PART=part,
        COLUMNS=launch.columns,
        num_warps=launch.combine_warps,
        **overlap(projected.device),
    )


@triton.jit
def rotated_head(head, cos, sin, position, D: tl.constexpr, ROTARY: tl.constexpr):
    """float32 [D]: a head's vector, its neighbours (0, 1), (2, 3), … among the first ROTARY turned."""
    dims = tl.arange(0, D)
    turned = dims < ROTARY
    own = tl.load(head + dims).to(tl.float32)
    other = tl.load(head + (dims ^ 1), mask=turned, other=0.0).to(tl.float32)
    angle = position * (ROTARY // 2) + dims // 2
    cosine = tl.load(cos + angle, mask=turned, other=1.0)
    sine = tl.load(sin + angle, mask=turned, other=0.0)
    return own * cosine + tl.where(dims % 2 == 0, -other, other) * sine


@triton.jit
def _attend_kernel(
    projected,
    projected_stride,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    table_stride,
    positions,
    beams,
    cos,
    sin,
    partial,
    maxima,
    sums,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROTARY: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_PAGES: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One split of one head of one row: `partial` [B, heads, SPLITS, D], `maxima` (of base-2 exponents) and `sums`
    [B, heads, SPLITS].

    The context before the new token is read from the cache; the new token itself belongs to split 0, which has it in
    registers.
    """
    let_next_begin(OVERLAPS)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    if beams is not None:
        position = tl.where(tl.load(beams + row) >= 0, -1, position)
    working = working_splits(position, PAGE, SPLITS, LEAST_PAGES)
    if split >= working:
        wait_for_last(OVERLAPS)
        return
    num_pages = tl.cdiv(position, PAGE)
    first_page = num_pages * split // working
    end_page = num_pages * (split + 1) // working
    dims = tl.arange(0, D)
    slots = tl.arange(0, PAGE)
    tile = tl.arange(0, TILE_PAGES)
    in_page = slots[:, None, None] * D + dims[None, None, :]  # [PAGE, 1, D]
    table = tables + row.to(tl.int64) * table_stride
    pages = tl.load(table + first_page + tile, mask=first_page + tile < end_page, other=0)

    wait_for_last(OVERLAPS)
    heads_of_row = projected + row.to(tl.int64) * projected_stride + head * D
    query = rotated_head(heads_of_row, cos, sin, position, D, ROTARY) * (D**-0.5 * LOG2_E)
    new_key = rotated_head(heads_of_row + HEADS * D, cos, sin, position, D, ROTARY)
    new_value = tl.load(heads_of_row + 2 * HEADS * D + dims).to(tl.float32)
    owns = split == 0
    page = tl.load(table + position // PAGE).to(tl.int64)
    offset = (page * HEADS + head) * (D * PAGE)
    slot = position % PAGE
    if key_scales is not None:
        key_scale, value_scale = scale_to_float8(new_key), scale_to_float8(new_value)
        new_key, new_value = new_key / key_scale, new_value / value_scale
        scale = (page * HEADS + head) * PAGE + slot
        tl.store(key_scales + scale, key_scale, mask=owns)
        tl.store(value_scales + scale, value_scale, mask=owns)
    stored_key, stored_value = new_key.to(keys.dtype.element_ty), new_value.to(values.dtype.element_ty)
    tl.store(keys + offset + slot * D + dims, stored_key, mask=owns & (dims >= 0))
    tl.store(values + offset + slot * D + dims, stored_value, mask=owns & (dims >= 0))
    # What later steps will read of it.
    new_key, new_value = stored_key.to(tl.float32), stored_value.to(tl.float32)
    if key_scales is not None:
        new_key, new_value = new_key * key_scale, new_value * value_scale

    # Each slot of a page has sums of its own until after the loop, so that no warp waits for another within it: the
    # threads of a slot, side by side, add up its score and weight its value. The least maximum is finite, because the
    # difference of two infinities is no number.
    mine = owns & (slots == 0)
    maximum = tl.where(mine, tl.sum(query * new_key), LOWEST)  # [PAGE]
    weight_sums = tl.where(mine, 1.0, 0.0)  # [PAGE]
    weighted = tl.where(mine[:, None], new_value[None, :], 0.0)  # [PAGE, D]
    for start in tl.range(first_page, end_page, TILE_PAGES, num_stages=STAGES):
        numbers = start + tile
        held = numbers < end_page
        heads_of_pages = pages.to(tl.int64) * HEADS + head
        offsets = heads_of_pages * (D * PAGE)
        # Here, so that the next tile's loads need not wait for it.
        pages = tl.load(table + numbers + TILE_PAGES, mask=numbers + TILE_PAGES < end_page, other=0)
        # Masked by page alone: a mask along the contiguous axis would cut loads to one element.
        key = tl.load(keys + offsets[None, :, None] + in_page, mask=held[None, :, None], other=0.0)
        value = tl.load(values + offsets[None, :, None] + in_page, mask=held[None, :, None], other=0.0)
        scores = tl.sum(query[None, None, :] * key.to(tl.float32), axis=2)  # [PAGE, TILE_PAGES]
        seen = held[None, :] & ((numbers * PAGE)[None, :] + slots[:, None] < position)
        if key_scales is not None:
            scales = heads_of_pages[None, :] * PAGE + slots[:, None]
            scores *= tl.load(key_scales + scales, mask=seen, other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])  # [PAGE, TILE_PAGES]
        rescale = tl.exp2(maximum - higher)
        # What a page holds behind the context is another's, and may even be infinite.
        value = tl.where(seen[:, :, None], value, 0.0).to(tl.float32)
        weight_sums = weight_sums * rescale + tl.sum(weights, axis=1)
        if value_scales is not None:
            weights *= tl.load(value_scales + scales, mask=seen, other=0.0)
        weighted = weighted * rescale[:, None] + tl.sum(weights[:, :, None] * value, axis=1)
        maximum = higher

    highest = tl.max(maximum, axis=0)
    rescale = tl.exp2(maximum - highest)
    part = (row * HEADS + head) * SPLITS + split
    tl.store(partial + part.to(tl.int64) * D + dims, tl.sum(weighted * rescale[:, None], axis=0))
    tl.store(maxima + part, highest)
    tl.store(sums + part, tl.sum(weight_sums * rescale, axis=0))


@triton.jit(do_not_specialize=["rows"])
def _combine_and_gelu_kernel(
    projected,
    projected_stride,
    positions,
    beams,
    partial,
    maxima,
    sums,
    activations,
    activations_stride,
    inner,
    rows,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_PAGES: tl.constexpr,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some columns of one row's activations: PART of a head's D out of the splits, or COLUMNS of GELU."""
    let_next_begin(OVERLAPS)
    wait_for_last(OVERLAPS)
    row, block = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    working = working_splits(position, PAGE, SPLITS, LEAST_PAGES)
    if beams is not None:
        search = tl.load(beams + row)
        if search >= 0:
            working = splits_of_search(beams + rows, search, position, PAGE, SPLITS, LEAST_PAGES)
    if working == 0:
        return
    out = activations + row.to(tl.int64) * activations_stride
    if block < HEADS * D // PART:
        columns = block * PART + tl.arange(0, PART)
        splits = tl.arange(0, SPLITS)
        held = splits < working
        parts = (row * HEADS + block * PART // D) * SPLITS + splits
        maximum = tl.load(maxima + parts, mask=held, other=float("-inf"))
        rescale = tl.exp2(maximum - tl.max(maximum, axis=0))
        total = tl.sum(tl.load(sums + parts, mask=held, other=0.0) * rescale, axis=0)
        entries = parts.to(tl.int64)[:, None] * D + (columns % D)[None, :]
        weighted = tl.sum(tl.load(partial + entries, mask=held[:, None], other=0.0) * rescale[:, None], axis=0)
        tl.store(out + columns, (weighted / total).to(activations.dtype.element_ty))
    else:
        units = (block - HEADS * D // PART) * COLUMNS + tl.arange(0, COLUMNS)
        inside = units < inner
        inputs = projected + row.to(tl.int64) * projected_stride + 3 * HEADS * D
        x = tl.load(inputs + units, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + HEADS * D + units, gelu_tanh(x).to(activations.dtype.element_ty), mask=inside)
