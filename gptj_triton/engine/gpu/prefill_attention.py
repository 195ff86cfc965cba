"""Attention of prompts: chunks of many packed without padding, causal against the paged cache. Knows no layer or batch.

T packed tokens in S chunks; D head size, a power of two from 16 up; A = heads * D, of this rank; PAGE tokens a page.
First every token's K and V go to the cache, then each block of queries reads its chunk's context through the page table
with a running softmax (Dao, 2023, FlashAttention-2). No result depends on another chunk.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.functions import LOG2_E, scale_to_float8
from gptj_triton.engine.gpu.kv_cache import LayerCache


class PrefillLaunch(NamedTuple):
    """`queries` tokens of a chunk a program, `keys` positions a step, `stages` of which are on their way at once."""

    queries: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 2


# By the bytes of shared memory that a program needs for heads of 256, the first fastest where it fits: on an H100.
HALVES = (
    (192 * 1024, PrefillLaunch()),
    (131 * 1024, PrefillLaunch(queries=128, keys=32, stages=3)),
    (0, PrefillLaunch(queries=64, keys=32, warps=4)),
)
FLOATS = PrefillLaunch(queries=32, keys=16, warps=8, stages=1)  # exact, so without matrix units, and slow

WRITE_TOKENS, WRITE_WARPS = 16, 4


def prefill_launch(dtype: torch.dtype, device: torch.device) -> PrefillLaunch:
    """How `prefill_attention` is launched by default."""
    if dtype == torch.float32:
        return FLOATS
    if device.type != "cuda":
        return HALVES[0][1]
    properties = torch.cuda.get_device_properties(device)
    room = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # newer than its types
    return next(launch for needed, launch in HALVES if needed <= room)


def query_blocks(starts: SequenceOf[int], first_rows: SequenceOf[int], queries: int) -> list[tuple[int, int]]:
    """Chunk and first row of each block of up to `queries` tokens of one chunk, those with the longest context first.

    `starts` are the S chunks' first positions, `first_rows` their first packed rows and, at the end, T.
    """
    blocks = [
        (start + row - first, chunk, row)
        for chunk, (start, first, end) in enumerate(zip(starts, first_rows[:-1], first_rows[1:], strict=True))
        for row in range(first, end, queries)
    ]
    return [(chunk, row) for _, chunk, row in sorted(blocks, key=lambda block: -block[0])]


def rotate_and_write(
    projected: Tensor,
    cache: LayerCache,
    pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """Rotate q and k of T tokens in place, and store K and V in the cache.

    `projected` [T, 3A] or wider, contiguous: q, k, v first. All of `cache` is contiguous. `pages`, `slots` and
    `positions` int32 [T], of each token; one at position -1 is left alone. `cos`, `sin` float32 [context, rotary_dim /
    2].
    """
    tokens, (_, heads, page, head_size) = projected.shape[0], cache.keys.shape
    _rotate_and_write_kernel[triton.cdiv(tokens, WRITE_TOKENS), heads](
        projected,
        projected.stride(0),
        *cache,
        pages,
        slots,
        positions,
        cos,
        sin,
        tokens,
        HEADS=heads,
        D=head_size,
        PAGE=page,
        ROTARY=2 * cos.shape[1],
        TOKENS=WRITE_TOKENS,
        num_warps=WRITE_WARPS,
    )


def prefill_attention(
    projected: Tensor,
    cache: LayerCache,
    tables: Tensor,
    starts: Tensor,
    first_rows: Tensor,
    blocks: Tensor,
    activations: Tensor,
    launch: PrefillLaunch | None = None,
) -> None:
    """Write the attention of each packed token over positions 0 to its own to `activations` [T, A] or wider, in front.

    `projected` and `cache` as `rotate_and_write` left them. `tables` int32 [S, P]: pages in order, of which no
    entry is read behind the chunk. `starts` int32 [S] and `first_rows` int32 [S + 1]: chunk s has rows first_rows[s] to
    first_rows[s + 1] and positions from starts[s] on. `blocks` int32 [blocks, 2]: `query_blocks` of `launch.queries`.
    """
    launch = launch or prefill_launch(projected.dtype, projected.device)
    _, heads, page, head_size = cache.keys.shape
    _attend_kernel[heads, blocks.shape[0]](  # the first axis starts first: the longest blocks of all heads
        projected,
        projected.stride(0),
        *cache,
        tables,
        tables.stride(0),
        starts,
        first_rows,
        blocks,
        activations,
        activations.stride(0),
        HEADS=heads,
        D=head_size,
        PAGE=page,
        QUERIES=launch.queries,
        KEYS=launch.keys,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


@triton.jit
def _rotated(vectors, cos, sin, positions, live, D: tl.constexpr, ROTARY: tl.constexpr):
    """float32 [D, tokens]: what the pointers `vectors` [tokens] lead to, neighbours among their first ROTARY turned."""
    dims = tl.arange(0, D)
    turned = (dims < ROTARY)[:, None] & live[None, :]
    own = tl.load(vectors[None, :] + dims[:, None], mask=live[None, :], other=0.0).to(tl.float32)
    other = tl.load(vectors[None, :] + (dims ^ 1)[:, None], mask=turned, other=0.0).to(tl.float32)
    angles = positions[None, :] * (ROTARY // 2) + (dims // 2)[:, None]
    cosine = tl.load(cos + angles, mask=turned, other=1.0)
    sine = tl.load(sin + angles, mask=turned, other=0.0)
    return own * cosine + tl.where((dims % 2 == 0)[:, None], -other, other) * sine


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_and_write_kernel(
    projected,
    projected_stride,
    keys,
    values,
    key_scales,
    value_scales,
    pages,
    slots,
    positions,
    cos,
    sin,
    num_tokens,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROTARY: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """TOKENS tokens of one head.

    Where addresses follow no order the compiler knows, it gives neighbouring threads neighbours of the first axis: D.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    position = tl.load(positions + tokens, mask=tokens < num_tokens, other=-1)
    live = position >= 0
    dims = tl.arange(0, D)
    turned = (dims < ROTARY)[:, None] & live[None, :]
    queries = projected + tokens.to(tl.int64) * projected_stride + head * D  # [TOKENS]
    query = _rotated(queries, cos, sin, position, live, D, ROTARY).to(projected.dtype.element_ty)
    key = _rotated(queries + HEADS * D, cos, sin, position, live, D, ROTARY).to(projected.dtype.element_ty)
    value = tl.load((queries + 2 * HEADS * D)[None, :] + dims[:, None], mask=live[None, :], other=0.0)
    tl.debug_barrier()  # a thread turns what its neighbour has, so all must have loaded before any stores
    tl.store(queries[None, :] + dims[:, None], query, mask=turned)
    tl.store((queries + HEADS * D)[None, :] + dims[:, None], key, mask=turned)

    page = tl.load(pages + tokens, mask=live, other=0).to(tl.int64)
    slot = tl.load(slots + tokens, mask=live, other=0)
    head_of_page = page * HEADS + head
    offset = head_of_page * (D * PAGE)
    if key_scales is not None:
        key, value = key.to(tl.float32), value.to(tl.float32)
        key_scale, value_scale = scale_to_float8(key), scale_to_float8(value)  # [TOKENS]
        key, value = key / key_scale[None, :], value / value_scale[None, :]
        tl.store(key_scales + head_of_page * PAGE + slot, key_scale, mask=live)
        tl.store(value_scales + head_of_page * PAGE + slot, value_scale, mask=live)
    places = (offset + slot * D)[None, :] + dims[:, None]  # [D, TOKENS]
    tl.store(keys + places, key.to(keys.dtype.element_ty), mask=live[None, :])
    tl.store(values + places, value.to(values.dtype.element_ty), mask=live[None, :])


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
    starts,
    first_rows,
    blocks,
    activations,
    activations_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries of one head."""
    head, block = tl.program_id(0), tl.program_id(1)
    chunk = tl.load(blocks + 2 * block)
    first = tl.load(blocks + 2 * block + 1)
    chunk_end = tl.load(first_rows + chunk + 1)
    first_position = tl.load(starts + chunk) + first - tl.load(first_rows + chunk)
    context = first_position + tl.minimum(QUERIES, chunk_end - first)
    rows = first + tl.arange(0, QUERIES)
    live = rows < chunk_end
    position = first_position + tl.arange(0, QUERIES)
    dims = tl.arange(0, D)
    steps = tl.arange(0, KEYS)
    table = tables + chunk.to(tl.int64) * table_stride

    to_query = projected + (rows.to(tl.int64) * projected_stride)[:, None] + (head * D + dims)[None, :]
    query = tl.load(to_query, mask=live[:, None], other=0.0)  # [QUERIES, D]
    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES, D), tl.float32)
    for start in range(0, context, KEYS):
        seen_at = start + steps
        held = seen_at < context
        page = tl.load(table + seen_at // PAGE, mask=held, other=0).to(tl.int64)
        head_of_page = page * HEADS + head
        offset = head_of_page * (D * PAGE)
        in_pages = offset[:, None] + (seen_at % PAGE * D)[:, None] + dims[None, :]  # [KEYS, D]
        key = tl.trans(tl.load(keys + in_pages, mask=held[:, None], other=0.0))
        scores = tl.dot(query, key.to(query.dtype), input_precision="ieee") * (D**-0.5 * LOG2_E)
        scale = head_of_page * PAGE + seen_at % PAGE
        if key_scales is not None:
            scores *= tl.load(key_scales + scale, mask=held, other=0.0)[None, :]
        scores = tl.where(seen_at[None, :] <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        rescale = tl.exp2(maximum - higher)
        # What a page holds behind the context is another's, and may even be infinite.
        value = tl.load(values + in_pages, mask=held[:, None], other=0.0)
        if value_scales is not None:
            value = (value.to(tl.float32) * tl.load(value_scales + scale, mask=held, other=0.0)[:, None]).to(
                query.dtype
            )
        total = total * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(value.dtype), value, weighted * rescale[:, None], input_precision="ieee")
        maximum = higher

    out = activations + (rows.to(tl.int64) * activations_stride)[:, None] + (head * D + dims)[None, :]
    tl.store(out, (weighted / total[:, None]).to(activations.dtype.element_ty), mask=live[:, None])
