"""Attention of the beams of searches in a decode step: what beams share is read once for all beams of a search.

Each beam writes K and V to pages of its own, and `cache_indirection` says which beam wrote a token that it continues.
So a search's context are the pages of its prompt, seen by all of its beams, and then the pages of each beam, of which
every beam sees some tokens: one tile of MOST_BEAMS queries goes over all of them. Splits and workspace are those of
decode_attention, which adds the splits up. Letters as there; N is how many searches a bucket has room for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.beam_rows import FIRST_ROW, PROMPT_LENGTH, SEARCH_FACTS, SLOT, WIDTH, BeamRows
from gptj_triton.engine.gpu.beam_state import MOST_BEAMS
from gptj_triton.engine.gpu.functions import LARGEST_FLOAT8, LOG2_E, LOWEST, scale_to_float8
from gptj_triton.engine.gpu.kv_cache import LayerCache
from gptj_triton.engine.gpu.overlap import let_next_begin, overlap, wait_for_last


class BeamLaunch(NamedTuple):
    """`pages` are read at once, by programs of `warps`, with `stages` - 1 tiles on their way. What stands here was
    fastest on an H100 for the heads of GPT-J 6B.
    """

    pages: int = 4
    warps: int = 4
    stages: int = 3


FLOATS = BeamLaunch(pages=1, stages=1)  # exact, so without matrix units, and slow


def beam_launch(dtype: torch.dtype) -> BeamLaunch:
    """How `attend_beams` is launched by default, for activations of that type."""
    return FLOATS if dtype == torch.float32 else BeamLaunch()


def attend_beams(
    projected: Tensor,
    cache: LayerCache,
    tables: Tensor,
    positions: Tensor,
    beams: BeamRows,
    cos: Tensor,
    sin: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    splits: int,
    least_pages: int,
    launch: BeamLaunch | None = None,
) -> None:
    """Write K and V of the rows that are beams to the cache, and their partial results to `parts`, as the kernel of
    decode_attention does for the other rows. Arguments are as there.
    """
    rows, (_, heads, page, head_size) = projected.shape[0], cache.keys.shape
    launch = launch or beam_launch(projected.dtype)
    if rows < 2:
        return
    _attend_beams_kernel[rows // 2, heads, splits](
        projected,
        projected.stride(0),
        *cache,
        tables,
        tables.stride(0),
        positions,
        beams.inputs[rows:],
        beams.cache_indirection,
        beams.cache_indirection.shape[2],
        cos,
        sin,
        *parts,
        HEADS=heads,
        D=head_size,
        PAGE=page,
        ROTARY=2 * cos.shape[1],
        SPLITS=splits,
        LEAST_PAGES=least_pages,
        TILE=launch.pages * page,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **overlap(projected.device),
    )


@triton.jit
def working_splits(position, PAGE: tl.constexpr, SPLITS: tl.constexpr, LEAST_PAGES: tl.constexpr):
    """How many splits have work for a token at `position`: none at -1, and the first one always otherwise."""
    shares = tl.cdiv(tl.cdiv(position, PAGE), LEAST_PAGES)
    return tl.where(position < 0, 0, tl.minimum(tl.maximum(shares, 1), SPLITS))


@triton.jit
def _pages_of_search(facts, position, PAGE: tl.constexpr):
    """Pages that are read for the new tokens at `position`: those of the prompt that are full, and those behind them of
    each beam.
    """
    shared = tl.load(facts + PROMPT_LENGTH) // PAGE
    own = tl.cdiv(position, PAGE) - shared
    return shared, own, shared + own * tl.load(facts + WIDTH)


@triton.jit
def splits_of_search(searches, search, position, PAGE: tl.constexpr, SPLITS: tl.constexpr, LEAST_PAGES: tl.constexpr):
    """How many splits have work for the beams of a search whose new tokens are at `position`."""
    _, _, pages = _pages_of_search(searches + search * SEARCH_FACTS, position, PAGE)
    return working_splits(pages * PAGE, PAGE, SPLITS, LEAST_PAGES)


@triton.jit
def _rotated_heads(heads, turns, cos, sin, position, D: tl.constexpr, ROTARY: tl.constexpr):
    """float32 [beams, D]: what the pointers `heads` [beams] lead to, neighbours among the first ROTARY turned; zeros
    where `turns` [beams] is false.
    """
    dims = tl.arange(0, D)
    turned = turns[:, None] & (dims < ROTARY)[None, :]
    own = tl.load(heads[:, None] + dims[None, :], mask=turns[:, None], other=0.0).to(tl.float32)
    other = tl.load(heads[:, None] + (dims ^ 1)[None, :], mask=turned, other=0.0).to(tl.float32)
    angle = position * (ROTARY // 2) + dims // 2
    cosine = tl.load(cos + angle, mask=dims < ROTARY, other=1.0)
    sine = tl.load(sin + angle, mask=dims < ROTARY, other=0.0)
    return own * cosine[None, :] + tl.where((dims % 2 == 0)[None, :], -other, other) * sine[None, :]


@triton.jit
def _scores(query, cached, heads_of_pages, steps, held, D: tl.constexpr, PAGE: tl.constexpr):
    """float32 [MOST_BEAMS, TILE], for exponents of base 2: `query` [MOST_BEAMS, D] times the keys of a tile, of which
    each token's page is in `heads_of_pages` and its slot in `steps`.
    """
    keys, _, key_scales, _ = cached
    slots = steps % PAGE
    places = (heads_of_pages * (D * PAGE) + slots * D)[:, None] + tl.arange(0, D)[None, :]
    key = tl.load(keys + places, mask=held[:, None], other=0.0)  # [TILE, D]
    scores = tl.dot(query, tl.trans(key).to(query.dtype), input_precision="ieee") * (D**-0.5 * LOG2_E)
    if key_scales is not None:
        scores *= tl.load(key_scales + heads_of_pages * PAGE + slots, mask=held, other=0.0)[None, :]
    return scores


@triton.jit
def _added(
    maximum,
    total,
    weighted,
    scores,
    cached,
    heads_of_pages,
    steps,
    held,
    dtype: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The running softmax with the values of a tile added: maximum and total [MOST_BEAMS], weighted [MOST_BEAMS, D]."""
    _, values, _, value_scales = cached
    slots = steps % PAGE
    higher = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    rescale = tl.exp2(maximum - higher)
    total = total * rescale + tl.sum(weights, axis=1)
    # What a page holds behind the context is another's, and may even be infinite.
    places = (heads_of_pages * (D * PAGE) + slots * D)[:, None] + tl.arange(0, D)[None, :]
    value = tl.load(values + places, mask=held[:, None], other=0.0).to(dtype)
    if value_scales is not None:  # by way of the weights, which are fewer
        scales = tl.load(value_scales + heads_of_pages * PAGE + slots, mask=held, other=0.0)
        weights *= (scales * LARGEST_FLOAT8)[None, :]
    weighted = tl.dot(weights.to(dtype), value, weighted * rescale[:, None], input_precision="ieee")
    return higher, total, weighted


@triton.jit
def _attend_beams_kernel(
    projected,
    projected_stride,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    table_stride,
    positions,
    searches,
    cache_indirection,
    context,
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
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One split of one head of one search."""
    let_next_begin(OVERLAPS)
    search, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    facts = searches + search * SEARCH_FACTS
    width = tl.load(facts + WIDTH)
    if width < 0:
        wait_for_last(OVERLAPS)
        return
    first_row = tl.load(facts + FIRST_ROW)
    position = tl.load(positions + first_row)
    shared, own, num_pages = _pages_of_search(facts, position, PAGE)
    working = working_splits(num_pages * PAGE, PAGE, SPLITS, LEAST_PAGES)
    if split >= working:
        wait_for_last(OVERLAPS)
        return
    prompt_length = tl.load(facts + PROMPT_LENGTH)
    begin = num_pages * split // working * PAGE  # counted in slots of the pages, one after another
    end = num_pages * (split + 1) // working * PAGE
    beams = tl.arange(0, MOST_BEAMS)
    live = beams < width
    dims = tl.arange(0, D)
    steps = tl.arange(0, TILE)
    table = tables + first_row.to(tl.int64) * table_stride
    owners = cache_indirection + (tl.load(facts + SLOT).to(tl.int64) * MOST_BEAMS + beams) * context - prompt_length

    wait_for_last(OVERLAPS)
    heads = projected + (first_row + beams).to(tl.int64) * projected_stride + head * D  # [MOST_BEAMS]
    query = _rotated_heads(heads, live, cos, sin, position, D, ROTARY)
    new_key = _rotated_heads(heads + HEADS * D, live, cos, sin, position, D, ROTARY)
    new_value = tl.load((heads + 2 * HEADS * D)[:, None] + dims[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    writes = live & (split == 0)
    own_page = tl.load(table + beams * table_stride + position // PAGE, mask=live, other=0).to(tl.int64)
    own_head = own_page * HEADS + head
    slot = position % PAGE
    if key_scales is not None:
        key_scale, value_scale = scale_to_float8(tl.trans(new_key)), scale_to_float8(tl.trans(new_value))
        new_key, new_value = new_key / key_scale[:, None], new_value / value_scale[:, None]
        tl.store(key_scales + own_head * PAGE + slot, key_scale, mask=writes)
        tl.store(value_scales + own_head * PAGE + slot, value_scale, mask=writes)
    stored_key, stored_value = new_key.to(keys.dtype.element_ty), new_value.to(values.dtype.element_ty)
    places = (own_head * (D * PAGE) + slot * D)[:, None] + dims[None, :]
    tl.store(keys + places, stored_key, mask=writes[:, None])
    tl.store(values + places, stored_value, mask=writes[:, None])
    # What later steps will read of it.
    new_key, new_value = stored_key.to(tl.float32), stored_value.to(tl.float32)
    if key_scales is not None:
        new_key, new_value = new_key * key_scale[:, None], new_value * value_scale[:, None]

    maximum = tl.where(writes, tl.sum(query * new_key, axis=1) * (D**-0.5 * LOG2_E), LOWEST)  # [MOST_BEAMS]
    total = tl.where(writes, 1.0, 0.0)
    weighted = tl.where(writes[:, None], new_value, 0.0)  # [MOST_BEAMS, D]
    if value_scales is not None:  # weights times scales would be too small for 16 bits
        weighted *= LARGEST_FLOAT8
    query = query.to(projected.dtype.element_ty)
    cached = (keys, values, key_scales, value_scales)
    for start in tl.range(begin, tl.minimum(end, shared * PAGE), TILE, num_stages=STAGES):
        held = start + steps < tl.minimum(end, shared * PAGE)
        pages = tl.load(table + (start + steps) // PAGE, mask=held, other=0).to(tl.int64)
        heads_of_pages = pages * HEADS + head
        scores = _scores(query, cached, heads_of_pages, steps, held, D, PAGE)
        scores = tl.where(held[None, :], scores, float("-inf"))
        maximum, total, weighted = _added(
            maximum, total, weighted, scores, cached, heads_of_pages, steps, held, query.dtype, D, PAGE
        )
    for start in tl.range(tl.maximum(begin, shared * PAGE), end, TILE, num_stages=STAGES):
        behind = (start + steps) // PAGE - shared
        beam = behind // own  # in whose table the page stands
        column = shared + behind % own
        seen_at = column * PAGE + steps % PAGE  # every page begins a multiple of PAGE behind `start`
        held = (start + steps < end) & (seen_at < position)
        pages = tl.load(table + beam * table_stride + column, mask=held, other=0).to(tl.int64)
        heads_of_pages = pages * HEADS + head
        scores = _scores(query, cached, heads_of_pages, steps, held, D, PAGE)
        generated = held & (seen_at >= prompt_length)
        owner = tl.load(owners[:, None] + seen_at[None, :], mask=live[:, None] & generated[None, :], other=0)
        owner = tl.where(generated[None, :], owner.to(tl.int32), beams[:, None])  # [MOST_BEAMS, TILE]
        scores = tl.where(held[None, :] & (owner == beam[None, :]), scores, float("-inf"))
        maximum, total, weighted = _added(
            maximum, total, weighted, scores, cached, heads_of_pages, steps, held, query.dtype, D, PAGE
        )
    if value_scales is not None:
        weighted /= LARGEST_FLOAT8

    part = ((first_row + beams) * HEADS + head) * SPLITS + split
    tl.store(partial + part.to(tl.int64)[:, None] * D + dims[None, :], weighted, mask=live[:, None])
    tl.store(maxima + part, maximum, mask=live)
    tl.store(sums + part, total, mask=live)
