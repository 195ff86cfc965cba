"""Chooses the next token of every row on the GPU, without the host: `sampler` is the reference, token for token.

Knows sequences and their parameters, nothing of the model. Not here: beams, and bad words of several tokens.

A row goes through these kernels, each with one program a row or one a row and chunk of the vocabulary:

- prepare: temperature, penalties and bans; the largest logit and the sum of exponentials of each chunk;
- bound: the few hundred groups of neighbouring ids that hold the row's largest logits;
- search: the smallest logit that top-k and top-p keep, among those groups, by bisection;
- search_whole: the same among all logits, for the rows where those groups were too few;
- weigh: the probability mass of each chunk that is kept;
- finish: the token, its log-probability, and the row's state for the next step.

Greedy batches need the first and the last alone. A token with logit v is kept by top-k when fewer than k logits are
above v, and by top-p when the mass above v is less than p of the mass that top-k kept; so ties stay together.
B are the rows of a step, R those there is room for, V the vocabulary, C its chunks, G its groups.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_engine.sampling_params import SamplingParams
from gptj_engine.sequence import Sequence

# Rows of the state's whole numbers, int64 [8, R].
_POSITION = tl.constexpr(0)  # tokens of prompt and output; -1 where there is no sequence
_SEED = tl.constexpr(1)  # the bits of an unsigned number
_GREEDY = tl.constexpr(2)
_TOP_K = tl.constexpr(3)  # 0 keeps all
_END_ID = tl.constexpr(4)
_TO_MINIMUM = tl.constexpr(5)  # tokens to come before the end id may
_SLOT = tl.constexpr(6)  # the row of `counts`; -1 for none
_RESET_ID = tl.constexpr(7)
_WHOLE = 8

# Rows of its real numbers, float64 [8, R].
_DIVISOR = tl.constexpr(0)
_TOP_P = tl.constexpr(1)
_FIRST_TOP_P = tl.constexpr(2)
_TOP_P_DECAY = tl.constexpr(3)
_LEAST_TOP_P = tl.constexpr(4)
_REPETITION = tl.constexpr(5)
_PRESENCE = tl.constexpr(6)
_FREQUENCY = tl.constexpr(7)
_REAL = 8

_NOBODY = [-1] + [0] * (_WHOLE + _REAL - 1)
_BANNED = -1  # in `counts`

# Keys are int32 in the order of the float32 they stand for: that of -inf, and one below all.
_LOWEST_KEY = tl.constexpr(-0x7F800001)
_NO_KEY = tl.constexpr(-0x80000000)
_HIGHEST_KEY = tl.constexpr(0x7FFFFFFF)

_NOISE_STEP = tl.constexpr(2.0**-53)


@dataclass(frozen=True)
class Blocks:
    """How the kernels cut their work: powers of two. A group is of `group` ids, and `groups` of them are searched."""

    chunk: int = 1024
    group: int = 16
    groups: int = 512
    whole: int = 8192
    prepare_warps: int = 4
    bound_warps: int = 8
    search_warps: int = 8
    whole_warps: int = 16
    finish_warps: int = 4


@dataclass(frozen=True)
class Work:
    """What some row of a batch asks for; it decides which kernels run. `counts`: penalties or bad words. `draws`: not
    all are greedy. `searches`: top-k or top-p.
    """

    counts: bool = False
    draws: bool = False
    searches: bool = False

    @staticmethod
    def of(params: SequenceOf[SamplingParams]) -> Work:
        drawn = [one for one in params if not one.greedy]
        return Work(
            counts=any(map(_needs_counts, params)),
            draws=bool(drawn),
            searches=any(one.top_k or one.top_p < 1.0 or one.top_p_decay < 1.0 for one in drawn),
        )


def can_sample_on_device(params: SamplingParams) -> bool:
    """False for what only the host's sampler does: beams, and bad words of several tokens."""
    return params.beam_width == 1 and all(len(word) == 1 for word in params.bad_words)


def _needs_counts(params: SamplingParams) -> bool:
    return params.penalised or bool(params.bad_words)


class SamplingState:
    """What `sample` knows of the rows, and the memory it works in; the same for every number of rows B <= R.

    `tokens` int32 [R] and `log_probs` float32 [R] are the last step's results. `counts` int32 [R, V] says how often a
    token stands in a sequence, -1 for one that is banned; only rows with penalties or bad words have a slot in it.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, blocks: Blocks | None = None) -> None:
        self.blocks = blocks or Blocks()
        self.vocab_size = vocab_size
        self.device = device
        self.work = Work()
        self._sequences: list[Sequence] = []
        self._slots: dict[Sequence, int] = {}
        self._free_slots = list(range(max_rows))
        chunks = triton.cdiv(vocab_size, self.blocks.chunk)
        groups = chunks * self.blocks.chunk // self.blocks.group

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._facts = zeros(_WHOLE + _REAL, max_rows, dtype=torch.int64)
        self._facts[0] = -1
        self.whole, self.real = self._facts[:_WHOLE], self._facts[_WHOLE:].view(torch.float64)
        self.counts = zeros(max_rows, vocab_size)
        self.tokens = zeros(max_rows)
        self.log_probs = zeros(max_rows, dtype=torch.float32)
        self.chunk_max = zeros(max_rows, chunks, dtype=torch.float32)
        self.chunk_best = zeros(max_rows, chunks)
        self.chunk_sum = zeros(max_rows, chunks, dtype=torch.float32)
        self.chunk_mass = zeros(max_rows, chunks, dtype=torch.float64)
        self.group_max = zeros(max_rows, groups, dtype=torch.float32)
        self.candidates = zeros(max_rows, self.blocks.groups)
        self.bounds = zeros(max_rows, 2)
        self.thresholds = zeros(max_rows, dtype=torch.float32)
        self.settled = zeros(max_rows)

    @property
    def max_rows(self) -> int:
        return self.tokens.shape[0]

    def load(self, sequences: SequenceOf[Sequence]) -> None:
        """Make `sequences` the rows of the steps to come, in this order; nothing waits for the GPU.

        One that was a row until now goes on from what the GPU knows of it, for the host may lag behind. Any other
        begins with what is known of it here.
        """
        if list(sequences) == self._sequences:
            return
        assert len(sequences) <= self.max_rows
        old_rows = {sequence: row for row, sequence in enumerate(self._sequences)}
        self._sequences = list(sequences)
        self.work = Work.of([sequence.params for sequence in sequences])
        fresh = [(row, sequence) for row, sequence in enumerate(sequences) if sequence not in old_rows]
        self._give_slots([sequence for _, sequence in fresh])
        table = np.empty((1 + _WHOLE + _REAL, self.max_rows), np.int64)
        table[1:] = np.array(_NOBODY)[:, None]
        table[0] = -1
        table[0, : len(sequences)] = [old_rows.get(sequence, -1) for sequence in sequences]
        if fresh:
            rows = [row for row, _ in fresh]
            table[1 : 1 + _WHOLE, rows] = np.array([self._whole_facts(sequence) for _, sequence in fresh], np.int64).T
            real = np.array([_real_facts(sequence) for _, sequence in fresh], np.float64)
            table[1 + _WHOLE :, rows] = real.view(np.int64).T
        on_device = self._to_device(torch.from_numpy(table))
        source, facts = on_device[0], on_device[1:]
        carried = self._facts.index_select(1, source.clamp(min=0))
        torch.where(source >= 0, carried, facts, out=self._facts)

    def clear(self) -> None:
        """Forget all rows, when the host's sampler has chosen tokens for them or for part of them."""
        self.load([])

    def _whole_facts(self, sequence: Sequence) -> list[int]:
        params = sequence.params
        return [
            sequence.num_tokens,
            params.random_seed - (1 << 64 if params.random_seed >> 63 else 0),
            int(params.greedy),
            params.top_k if params.top_k < self.vocab_size else 0,
            params.end_id,
            max(0, params.min_length - len(sequence.output)),
            self._slots.get(sequence, -1),
            params.top_p_reset_id,
        ]

    def _give_slots(self, fresh: list[Sequence]) -> None:
        """Give `fresh` sequences rows of `counts`, and take those of the sequences that are gone."""
        staying = set(self._sequences)
        for gone in [sequence for sequence in self._slots if sequence not in staying]:
            self._free_slots.append(self._slots.pop(gone))
        counted = [sequence for sequence in fresh if _needs_counts(sequence.params)]
        if not counted:
            return
        places: list[int] = []
        banned: list[int] = []
        for sequence in counted:
            slot = self._slots[sequence] = self._free_slots.pop()
            first = slot * self.vocab_size
            places += [first + token for token in sequence.tokens(0, sequence.num_tokens)]
            banned += [first + word[-1] for word in sequence.params.bad_words]
        slots = [self._slots[sequence] for sequence in counted]
        packed = self._to_device(torch.tensor(slots + places + banned))
        on_slots, on_places, on_banned = packed.split([len(slots), len(places), len(banned)])
        self.counts.index_fill_(0, on_slots, 0)
        flat = self.counts.view(-1)
        flat.index_add_(0, on_places, torch.ones_like(on_places, dtype=torch.int32))
        flat.index_fill_(0, on_banned, _BANNED)

    def _to_device(self, numbers: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return numbers
        return numbers.pin_memory().to(self.device, non_blocking=True)


def _real_facts(sequence: Sequence) -> list[float]:
    params = sequence.params
    return [
        params.divisor,
        sequence.top_p,
        params.top_p,
        params.top_p_decay,
        min(params.top_p_min, params.top_p),
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    ]


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
    if tl.load(whole + _POSITION * R + row) < 0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < V
    x = tl.load(logits + row * V + ids, mask=inside, other=float("-inf"))
    if DRAWS:
        x = tl.div_rn(x, tl.load(real + _DIVISOR * R + row).to(tl.float32))
    if COUNTS:
        slot = tl.load(whole + _SLOT * R + row)
        if slot >= 0:
            count = tl.load(counts + slot * V + ids, mask=inside, other=0)
            repetition = tl.load(real + _REPETITION * R + row).to(tl.float32)
            presence = tl.load(real + _PRESENCE * R + row).to(tl.float32)
            frequency = tl.load(real + _FREQUENCY * R + row).to(tl.float32)
            penalised = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
            penalised = penalised - presence - frequency * count.to(tl.float32)
            x = tl.where(count > 0, penalised, x)
            x = tl.where(count < 0, float("-inf"), x)
    end_id = tl.load(whole + _END_ID * R + row)
    too_early = tl.load(whole + _TO_MINIMUM * R + row) > 0
    x = tl.where((ids == end_id) & too_early, float("-inf"), x)
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
    if _keeps_all(whole, real, row, R):
        tl.store(thresholds + row, float("-inf"))
        return
    bound = tl.load(bounds + row * 2)
    count = tl.load(bounds + row * 2 + 1)
    best, total = _row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS)
    top_k = tl.load(whole + _TOP_K * R + row)
    top_p = tl.load(real + _TOP_P * R + row).to(tl.float32)

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
    tl.store(thresholds + row, _value(tl.where(narrow, high, kept).to(tl.int32)))


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
    best, total = _row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS)
    top_k = tl.load(whole + _TOP_K * R + row)
    top_p = tl.load(real + _TOP_P * R + row).to(tl.float32)
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
    tl.store(thresholds + row, _value(tl.where(top_p < 1.0, high, kept).to(tl.int32)))


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
    if tl.load(whole + _POSITION * R + row) < 0:
        return
    if tl.load(whole + _GREEDY * R + row) != 0:
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
    position = tl.load(whole + _POSITION * R + row)
    if position < 0:
        return
    numbers = tl.arange(0, CHUNKS)
    there = numbers < chunks
    largest = tl.load(chunk_max + row * chunks + numbers, mask=there, other=float("-inf"))
    firsts = tl.load(chunk_best + row * chunks + numbers, mask=there, other=0)
    best, total = _row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS)
    token = tl.min(tl.where(there & (largest == best), firsts, V), axis=0)
    token = tl.minimum(token, V - 1)
    logit = best
    if DRAWS:
        if tl.load(whole + _GREEDY * R + row) == 0:
            masses = tl.load(chunk_mass + row * chunks + numbers, mask=there, other=0.0)
            sums = tl.cumsum(masses, axis=0)
            noise = _uniform(tl.load(whole + _SEED * R + row), position)
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

    tl.store(whole + _POSITION * R + row, position + 1)
    to_minimum = tl.load(whole + _TO_MINIMUM * R + row)
    tl.store(whole + _TO_MINIMUM * R + row, tl.maximum(to_minimum - 1, 0))
    if SEARCHES:
        decayed = tl.load(real + _TOP_P * R + row) * tl.load(real + _TOP_P_DECAY * R + row)
        decayed = tl.maximum(decayed, tl.load(real + _LEAST_TOP_P * R + row))
        reset = token == tl.load(whole + _RESET_ID * R + row)
        tl.store(real + _TOP_P * R + row, tl.where(reset, tl.load(real + _FIRST_TOP_P * R + row), decayed))
    if COUNTS:
        slot = tl.load(whole + _SLOT * R + row)
        if slot >= 0:
            count = tl.load(counts + slot * V + token)
            tl.store(counts + slot * V + token, count + 1, mask=count >= 0)


@triton.jit
def _keeps_all(whole, real, row, R):
    """Whether there is nothing to search for: no sequence, a greedy one, or neither top-k nor top-p."""
    undrawn = (tl.load(whole + _POSITION * R + row) < 0) | (tl.load(whole + _GREEDY * R + row) != 0)
    unlimited = tl.load(whole + _TOP_K * R + row) <= 0
    return undrawn | (unlimited & (tl.load(real + _TOP_P * R + row).to(tl.float32) >= 1.0))


@triton.jit
def _row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS: tl.constexpr):
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
