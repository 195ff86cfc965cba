"""Chooses the next token of every row on the GPU, without the host: `sampler` is the reference, token for token.

Knows the rows' state, nothing of the model. Not here: what `can_sample_on_device` says.

A row goes through these kernels, each with one program a row or one a row and chunk of the vocabulary:

- prepare: temperature, penalties and bans; the largest logit and the sum of exponentials of each chunk;
- bound: the few hundred groups of neighbouring ids that hold the row's largest logits;
- search: the smallest logit that top-k, top-p and min-p keep, among those groups, by bisection;
- search_whole: the same among all logits, for the rows where those groups were too few;
- weigh: the probability mass of each chunk that is kept;
- finish: the token, its log-probability, and the row's state for the next step.

Greedy batches need the first and the last alone. A token with logit v is kept by top-k when fewer than k logits are
above v, by top-p when the mass above v is less than p of the mass that top-k kept, and by min-p when v is not below the
largest logit plus log p; so ties stay together.
B are the rows of a step, R those there is room for, V the vocabulary, C its chunks, G its groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.sampling_state import (
    DIVISOR,
    END_IDS,
    FIRST_TOP_P,
    FREQUENCY,
    GREEDY,
    LEAST_TOP_P,
    LOG_MIN_P,
    MOST_END_IDS,
    POSITION,
    PRESENCE,
    REPETITION,
    RESET_ID,
    SEED,
    SLOT,
    TO_MINIMUM,
    TOP_K,
    TOP_P,
    TOP_P_DECAY,
    SamplingState,
    Work,
)

# Keys are int32 in the order of the float32 they stand for: that of -inf, and one below all.
_LOWEST_KEY = tl.constexpr(-0x7F800001)
_NO_KEY = tl.constexpr(-0x80000000)
_HIGHEST_KEY = tl.constexpr(0x7FFFFFFF)

_NOISE_STEP = tl.constexpr(2.0**-53)


def sample(logits: Tensor, state: SamplingState, work: Work) -> tuple[Tensor, Tensor]:
    """Next tokens int32 [B] and their natural log-probabilities float32 [B], of the first B rows of `state`.

    `logits` float32 [B, V], contiguous, are overwritten. `work` is `state.work`, or more than that: each different one
    is a static sequence of kernels. The results are views of `state`, which the next step overwrites.
    """
    rows, vocab_size = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32
    assert vocab_size == state.vocab_size and rows <= state.max_rows
    blocks, room = state.blocks, state.max_rows
    chunks, groups = state.chunk_max.shape[1], state.group_max.shape[1]
    padded_chunks = triton.next_power_of_2(chunks)
    _prepare_kernel[(chunks, rows)](
        logits,
        state.whole,
        state.real,
        state.counts,
        state.chunk_max,
        state.chunk_best,
        state.chunk_sum,
        state.group_max,
        vocab_size,
        room,
        COUNTS=work.counts,
        DRAWS=work.draws,
        SEARCHES=work.searches,
        CHUNK=blocks.chunk,
        GROUP=blocks.group,
        num_warps=blocks.prepare_warps,
        enable_fp_fusion=False,  # penalties are to round as the reference's do, so that ties stay ties
    )
    if work.searches:
        _bound_kernel[(rows,)](
            state.whole,
            state.real,
            state.group_max,
            state.candidates,
            state.bounds,
            groups,
            room,
            GROUPS=triton.next_power_of_2(groups),
            WANTED=blocks.groups,
            num_warps=blocks.bound_warps,
        )
        _search_kernel[(rows,)](
            logits,
            state.whole,
            state.real,
            state.chunk_max,
            state.chunk_sum,
            state.candidates,
            state.bounds,
            state.thresholds,
            state.settled,
            vocab_size,
            room,
            chunks,
            CHUNKS=padded_chunks,
            WANTED=blocks.groups,
            GROUP=blocks.group,
            num_warps=blocks.search_warps,
        )
        _search_whole_kernel[(rows,)](
            logits,
            state.whole,
            state.real,
            state.chunk_max,
            state.chunk_sum,
            state.thresholds,
            state.settled,
            vocab_size,
            room,
            chunks,
            CHUNKS=padded_chunks,
            BLOCK=blocks.whole,
            num_warps=blocks.whole_warps,
        )
    if work.draws:
        _weigh_kernel[(chunks, rows)](
            logits,
            state.whole,
            state.chunk_max,
            state.thresholds,
            state.chunk_mass,
            vocab_size,
            room,
            chunks,
            SEARCHES=work.searches,
            CHUNKS=padded_chunks,
            CHUNK=blocks.chunk,
            num_warps=blocks.prepare_warps,
        )
    _finish_kernel[(rows,)](
        logits,
        state.whole,
        state.real,
        state.counts,
        state.chunk_max,
        state.chunk_best,
        state.chunk_sum,
        state.chunk_mass,
        state.thresholds,
        state.tokens,
        state.log_probs,
        vocab_size,
        room,
        chunks,
        COUNTS=work.counts,
        DRAWS=work.draws,
        SEARCHES=work.searches,
        CHUNKS=padded_chunks,
        CHUNK=blocks.chunk,
        num_warps=blocks.finish_warps,
    )
    return state.tokens[:rows], state.log_probs[:rows]


@triton.jit
def _prepare_kernel(
    logits,
    whole,
    real,
    counts,
    chunk_max,
    chunk_best,
    chunk_sum,
    group_max,
    V,
    R,
    COUNTS: tl.constexpr,
    DRAWS: tl.constexpr,
    SEARCHES: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if tl.load(whole + POSITION * R + row) < 0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < V
    x = tl.load(logits + row * V + ids, mask=inside, other=float("-inf"))
    if DRAWS:
        x = tl.div_rn(x, tl.load(real + DIVISOR * R + row).to(tl.float32))
    if COUNTS:
        slot = tl.load(whole + SLOT * R + row)
        if slot >= 0:
            count = tl.load(counts + slot * V + ids, mask=inside, other=0)
            repetition = tl.load(real + REPETITION * R + row).to(tl.float32)
            presence = tl.load(real + PRESENCE * R + row).to(tl.float32)
            frequency = tl.load(real + FREQUENCY * R + row).to(tl.float32)
            penalised = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
            penalised = penalised - presence - frequency * count.to(tl.float32)
            x = tl.where(count > 0, penalised, x)
            x = tl.where(count < 0, float("-inf"), x)
    if tl.load(whole + TO_MINIMUM * R + row) > 0:
        for number in tl.static_range(MOST_END_IDS):
            x = tl.where(ids == tl.load(whole + (END_IDS + number) * R + row), float("-inf"), x)
    if DRAWS:
        tl.store(logits + row * V + ids, x, mask=inside)
    best = tl.max(x, axis=0)
    place = row * tl.num_programs(0) + chunk
    tl.store(chunk_max + place, best)
    tl.store(chunk_best + place, tl.min(tl.where(x == best, ids, V), axis=0))
    tl.store(chunk_sum + place, tl.sum(tl.exp(x - _finite(best)), axis=0))
    if SEARCHES:
        largest = tl.max(tl.reshape(x, (CHUNK // GROUP, GROUP)), axis=1)
        tl.store(group_max + place * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP), largest)


@triton.jit
def _bound_kernel(whole, real, group_max, candidates, bounds, groups, R, GROUPS: tl.constexpr, WANTED: tl.constexpr):
    """Lists the groups with a logit above some bound, as many as `candidates` [R, WANTED] has room for and half as many
    at least, unless ties are in the way. `bounds` [R, 2] takes the bound's key and how many they are.
    """
    row = tl.program_id(0).to(tl.int64)
    if _keeps_all(whole, real, row, R):
        return
    numbers = tl.arange(0, GROUPS)
    largest = tl.load(group_max + row * groups + numbers, mask=numbers < groups, other=float("-inf"))
    keys = tl.where(numbers < groups, _key(largest), _NO_KEY)
    low = tl.full((), _LOWEST_KEY - 1, tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        above = tl.sum((keys > middle.to(tl.int32)).to(tl.int32), axis=0)
        few = above <= WANTED
        high = tl.where(few, middle, high)
        low = tl.where(few, tl.where(above > WANTED // 2, middle, low), middle + 1)
    chosen = keys > high.to(tl.int32)
    places = tl.cumsum(chosen.to(tl.int32), axis=0)
    tl.store(candidates + row * WANTED + places - 1, numbers, mask=chosen)
    tl.store(bounds + row * 2, high.to(tl.int32))
    tl.store(bounds + row * 2 + 1, tl.sum(chosen.to(tl.int32), axis=0))


@triton.jit
def _search_kernel(
    logits,
    whole,
    real,
    chunk_max,
    chunk_sum,
    candidates,
    bounds,
    thresholds,
    settled,
    V,
    R,
    chunks,
    CHUNKS: tl.constexpr,
    WANTED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The threshold, where all that is kept is above the bound of the candidates; else the row is left unsettled."""
    row = tl.program_id(0).to(tl.int64)
    best, total = row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS)
    floor = best + tl.load(real + LOG_MIN_P * R + row).to(tl.float32)
    if _keeps_all(whole, real, row, R):
        tl.store(thresholds + row, floor)
        return
    bound = tl.load(bounds + row * 2)
    count = tl.load(bounds + row * 2 + 1)
    top_k = tl.load(whole + TOP_K * R + row)
    top_p = tl.load(real + TOP_P * R + row).to(tl.float32)

    places = tl.arange(0, WANTED * GROUP)
    listed = places // GROUP < count
    group = tl.load(candidates + row * WANTED + places // GROUP, mask=listed, other=0)
    ids = group * GROUP + places % GROUP
    x = tl.load(logits + row * V + ids, mask=listed & (ids < V), other=float("-inf"))
    keys = tl.where(listed & (ids < V), _key(x), _NO_KEY)
    keys = tl.where(keys > bound, keys, _NO_KEY)
    mass = tl.where(keys > bound, tl.exp(x - _finite(best)), 0.0).to(tl.float64)

    enough_for_k = tl.sum((keys > bound).to(tl.int32), axis=0) >= top_k
    enough_for_p = tl.sum(mass, axis=0) >= top_p.to(tl.float64) * total
    done = tl.where(top_k > 0, enough_for_k, enough_for_p)
    tl.store(settled + row, done.to(tl.int32))

    highest = _key(best).to(tl.int64)
    low = tl.where(done & (top_k > 0), bound.to(tl.int64) + 1, highest)
    high = highest
    while low < high:
        middle = (low + high) >> 1
        few = tl.sum((keys > middle.to(tl.int32)).to(tl.int32), axis=0) < top_k
        high = tl.where(few, middle, high)
        low = tl.where(few, low, middle + 1)
    kept = tl.where(top_k > 0, high, bound.to(tl.int64) + 1)
    total = tl.where(top_k > 0, tl.sum(tl.where(keys >= kept.to(tl.int32), mass, 0.0), axis=0), total)
    wanted = top_p.to(tl.float64) * total
    narrow = done & (top_p < 1.0)
    low = tl.where(narrow, kept, highest)
    high = highest
    while low < high:
        middle = (low + high) >> 1
        little = tl.sum(tl.where(keys > middle.to(tl.int32), mass, 0.0), axis=0) < wanted
        high = tl.where(little, middle, high)
        low = tl.where(little, low, middle + 1)
    tl.store(thresholds + row, tl.maximum(_value(tl.where(narrow, high, kept).to(tl.int32)), floor))


@triton.jit
def _search_whole_kernel(
    logits,
    whole,
    real,
    chunk_max,
    chunk_sum,
    thresholds,
    settled,
    V,
    R,
    chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold of the rows that are not settled yet, from keys that occur in the row alone."""
    row = tl.program_id(0).to(tl.int64)
    if _keeps_all(whole, real, row, R):
        return
    if tl.load(settled + row) != 0:
        return
    best, total = row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS)
    top_k = tl.load(whole + TOP_K * R + row)
    top_p = tl.load(real + TOP_P * R + row).to(tl.float32)
    shift = _finite(best)
    highest = _key(best).to(tl.int64)
    kept = tl.full((), _LOWEST_KEY, tl.int64)
    low = tl.where(top_k > 0, kept, highest)
    high = highest
    while low < high:
        middle = (low + high) >> 1
        above, _, next_above, next_below = _split(logits + row * V, V, middle.to(tl.int32), shift, BLOCK)
        few = above < top_k
        high = tl.where(few, tl.maximum(next_below, low), high)
        low = tl.where(few, low, next_above)
    kept = tl.where(top_k > 0, high, kept)
    if top_k > 0:
        _, total, _, _ = _split(logits + row * V, V, (kept - 1).to(tl.int32), shift, BLOCK)
    wanted = top_p.to(tl.float64) * total
    low = tl.where(top_p < 1.0, kept, highest)
    high = highest
    while low < high:
        middle = (low + high) >> 1
        _, mass, next_above, next_below = _split(logits + row * V, V, middle.to(tl.int32), shift, BLOCK)
        little = mass < wanted
        high = tl.where(little, tl.maximum(next_below, low), high)
        low = tl.where(little, low, next_above)
    floor = best + tl.load(real + LOG_MIN_P * R + row).to(tl.float32)
    tl.store(thresholds + row, tl.maximum(_value(tl.where(top_p < 1.0, high, kept).to(tl.int32)), floor))


@triton.jit
def _split(x_row, V, key, shift, BLOCK: tl.constexpr):
    """How many of a row's logits are above `key`, their mass, the lowest key of them and the highest of the others."""
    above = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float64)
    next_above = tl.full((BLOCK,), _HIGHEST_KEY, tl.int32)
    next_below = tl.full((BLOCK,), _NO_KEY, tl.int32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + ids, mask=ids < V, other=float("-inf"))
        keys = tl.where(ids < V, _key(x), _NO_KEY)
        over = keys > key
        above += over.to(tl.int32)
        mass += tl.where(over, tl.exp(x - shift), 0.0).to(tl.float64)
        next_above = tl.minimum(next_above, tl.where(over, keys, _HIGHEST_KEY))
        next_below = tl.maximum(next_below, tl.where(over, _NO_KEY, keys))
    return (
        tl.sum(above, axis=0),
        tl.sum(mass, axis=0),
        tl.min(next_above, axis=0).to(tl.int64),
        tl.max(next_below, axis=0).to(tl.int64),
    )


@triton.jit
def _weigh_kernel(
    logits,
    whole,
    chunk_max,
    thresholds,
    chunk_mass,
    V,
    R,
    chunks,
    SEARCHES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if tl.load(whole + POSITION * R + row) < 0:
        return
    if tl.load(whole + GREEDY * R + row) != 0:
        return
    numbers = tl.arange(0, CHUNKS)
    largest = tl.load(chunk_max + row * chunks + numbers, mask=numbers < chunks, other=float("-inf"))
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * V + ids, mask=ids < V, other=float("-inf"))
    kept = ids < V
    if SEARCHES:
        kept = kept & (x >= tl.load(thresholds + row))
    mass = tl.where(kept, tl.exp(x - _finite(tl.max(largest, axis=0))), 0.0)
    tl.store(chunk_mass + row * chunks + chunk, tl.sum(mass.to(tl.float64), axis=0))


@triton.jit
def _finish_kernel(
    logits,
    whole,
    real,
    counts,
    chunk_max,
    chunk_best,
    chunk_sum,
    chunk_mass,
    thresholds,
    tokens,
    log_probs,
    V,
    R,
    chunks,
    COUNTS: tl.constexpr,
    DRAWS: tl.constexpr,
    SEARCHES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(whole + POSITION * R + row)
    if position < 0:
        return
    numbers = tl.arange(0, CHUNKS)
    there = numbers < chunks
    largest = tl.load(chunk_max + row * chunks + numbers, mask=there, other=float("-inf"))
    firsts = tl.load(chunk_best + row * chunks + numbers, mask=there, other=0)
    best, total = row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS)
    token = tl.min(tl.where(there & (largest == best), firsts, V), axis=0)
    token = tl.minimum(token, V - 1)
    logit = best
    if DRAWS:
        if tl.load(whole + GREEDY * R + row) == 0:
            masses = tl.load(chunk_mass + row * chunks + numbers, mask=there, other=0.0)
            sums = tl.cumsum(masses, axis=0)
            noise = _uniform(tl.load(whole + SEED * R + row), position)
            target = noise * tl.max(sums, axis=0)
            # rounding may leave nothing above the target: then it is the last chunk, or token, of any mass
            last_chunk = tl.max(tl.where(masses > 0.0, numbers, -1), axis=0)
            chunk = tl.min(tl.where((masses > 0.0) & (sums > target), numbers, CHUNKS), axis=0)
            chunk = tl.where(chunk < CHUNKS, chunk, last_chunk)
            before = tl.sum(tl.where(numbers < chunk, masses, 0.0), axis=0)
            ids = tl.maximum(chunk, 0) * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + row * V + ids, mask=ids < V, other=float("-inf"))
            kept = ids < V
            if SEARCHES:
                kept = kept & (x >= tl.load(thresholds + row))
            mass = tl.where(kept, tl.exp(x - _finite(best)), 0.0).to(tl.float64)
            reached = (before + tl.cumsum(mass, axis=0) > target) & (mass > 0.0)
            last_token = tl.max(tl.where(mass > 0.0, ids, -1), axis=0)
            token = tl.min(tl.where(reached, ids, V), axis=0)
            token = tl.where(token < V, token, last_token)
            token = tl.where(token >= 0, token, V - 1)  # a row of which every token is banned
            logit = tl.load(logits + row * V + token)
    tl.store(tokens + row, token)
    tl.store(log_probs + row, logit - best - tl.log(total.to(tl.float32)))

    tl.store(whole + POSITION * R + row, position + 1)
    to_minimum = tl.load(whole + TO_MINIMUM * R + row)
    tl.store(whole + TO_MINIMUM * R + row, tl.maximum(to_minimum - 1, 0))
    if SEARCHES:
        decayed = tl.load(real + TOP_P * R + row) * tl.load(real + TOP_P_DECAY * R + row)
        decayed = tl.maximum(decayed, tl.load(real + LEAST_TOP_P * R + row))
        reset = token == tl.load(whole + RESET_ID * R + row)
        tl.store(real + TOP_P * R + row, tl.where(reset, tl.load(real + FIRST_TOP_P * R + row), decayed))
    if COUNTS:
        slot = tl.load(whole + SLOT * R + row)
        if slot >= 0:
            count = tl.load(counts + slot * V + token)
            tl.store(counts + slot * V + token, count + 1, mask=count >= 0)


@triton.jit
def _keeps_all(whole, real, row, R):
    """Whether there is nothing to search for: no sequence, a greedy one, or neither top-k nor top-p."""
    undrawn = (tl.load(whole + POSITION * R + row) < 0) | (tl.load(whole + GREEDY * R + row) != 0)
    unlimited = tl.load(whole + TOP_K * R + row) <= 0
    return undrawn | (unlimited & (tl.load(real + TOP_P * R + row).to(tl.float32) >= 1.0))


@triton.jit
def row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS: tl.constexpr):
    """A row's largest logit, and the sum of the exponentials of what the logits are below it, float64."""
    numbers = tl.arange(0, CHUNKS)
    largest = tl.load(chunk_max + row * chunks + numbers, mask=numbers < chunks, other=float("-inf"))
    sums = tl.load(chunk_sum + row * chunks + numbers, mask=numbers < chunks, other=0.0)
    best = tl.max(largest, axis=0)
    return best, tl.sum((sums * tl.exp(largest - _finite(best))).to(tl.float64), axis=0)


@triton.jit
def _finite(best):
    """What to subtract before exponentials are taken, such that -inf gives 0 where all logits are -inf, too."""
    return tl.where(best == float("-inf"), 0.0, best)


@triton.jit
def _key(x):
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(seed, position):
    """`sampler.uniform` bit for bit, float64: both arguments int64, of which the bits count."""
    mixed = _splitmix(_splitmix(seed.to(tl.uint64)) ^ position.to(tl.uint64))
    return (mixed >> 11).to(tl.int64).to(tl.float64) * _NOISE_STEP


@triton.jit
def _splitmix(value):
    value = value + 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)
