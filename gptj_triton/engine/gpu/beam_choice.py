"""Chooses the beams of all searches of a batch on the GPU, without the host: engine/beam.py is the reference.

Two kernels after those of `sampling` that prepare logits: `candidates` finds the best tokens of each beam, `choose`
takes the best of a whole search, and moves what the GPU knows of its beams: total log-probabilities, and whose pages
hold which token. Finished hypotheses are the host's, who learns of them a step late; no step depends on them. N are the
searches of a batch, R rows, V the vocabulary, C its chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.beam_state import (
    CHOICE_INTS,
    DIVERSITY_RATE,
    FIRST_ROW,
    LENGTH,
    MOST_BEAMS,
    MOST_CHOICES,
    NUM_CHOICES,
    NUM_FACTS,
    NUM_ROWS,
    REST_PLACE,
    SEARCH_SLOT,
    WIDTH,
    BeamState,
)
from gptj_triton.engine.gpu.sampling import row_sum
from gptj_triton.engine.gpu.sampling_state import END_IDS, MOST_END_IDS, SamplingState

# Offers that a program of the last kernel has room for: those of nearly all searches, and of all.
FEW_OFFERS, MOST_OFFERS = 256, 2048


def choose_beams(logits: Tensor, state: SamplingState, beams: BeamState, searches: Tensor, few_offers: bool) -> Tensor:
    """Choose for the N `searches`, int64 [N, NUM_FACTS]; returns int32 [N, CHOICE_INTS], which `read_choices` reads.

    `logits` float32 [B, V] and `state` are as `sample` left them, which must have known that there are beams.
    `few_offers`: each search has FEW_OFFERS at most. Puts the new tokens into `state.tokens`, at the places that the
    facts name.
    """
    count = len(searches)
    chunks = state.chunk_max.shape[1]
    blocks = state.blocks
    _candidates_kernel[(MOST_BEAMS.value, count)](
        logits,
        searches,
        state.chunk_max,
        state.chunk_best,
        state.chunk_sum,
        beams.tokens,
        beams.log_probs,
        state.vocab_size,
        chunks,
        CHUNKS=triton.next_power_of_2(chunks),
        CHUNK=blocks.chunk,
        num_warps=blocks.prepare_warps,
    )
    choices = beams.choices[:count]
    _choose_kernel[(count,)](
        searches,
        state.whole,
        state.max_rows,
        beams.tokens,
        beams.log_probs,
        beams.cum_log_probs,
        beams.cache_indirection,
        beams.cache_indirection.shape[2],
        choices,
        state.tokens,
        OFFERS=FEW_OFFERS if few_offers else MOST_OFFERS,
        BLOCK=128,
        num_warps=4,
        enable_fp_fusion=False,  # sums are to round as the host's do
    )
    return choices


@triton.jit
def _candidates_kernel(
    logits,
    searches,
    chunk_max,
    chunk_best,
    chunk_sum,
    tokens,
    log_probs,
    V,
    chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A beam's best tokens, best first, the lower id first where they tie: `tokens` and `log_probs`
    [N, MOST_BEAMS, MOST_CHOICES].
    """
    beam, search = tl.program_id(0), tl.program_id(1)
    facts = searches + search * NUM_FACTS
    if beam >= tl.load(facts + NUM_ROWS):
        return
    row = tl.load(facts + FIRST_ROW) + beam
    wanted = tl.load(facts + NUM_CHOICES).to(tl.int32)
    best, total = row_sum(chunk_max, chunk_sum, row, chunks, CHUNKS)
    log_total = tl.log(total.to(tl.float32))
    numbers = tl.arange(0, CHUNKS)
    there = numbers < chunks
    largest = tl.load(chunk_max + row * chunks + numbers, mask=there, other=float("-inf"))
    firsts = tl.load(chunk_best + row * chunks + numbers, mask=there, other=V)
    place = (search * MOST_BEAMS + beam) * MOST_CHOICES
    for number in range(wanted):
        logit = tl.max(largest, axis=0)
        token = tl.min(tl.where(largest == logit, firsts, V), axis=0)
        token = tl.minimum(token, V - 1)  # where logits are no numbers
        tl.store(tokens + place + number, token)
        tl.store(log_probs + place + number, logit - best - log_total)
        # The next best of that chunk takes the place of this one.
        chunk = token // CHUNK
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * V + ids, mask=ids < V, other=float("-inf"))
        left = (ids < V) & ((x < logit) | ((x == logit) & (ids > token)))
        x = tl.where(left, x, float("-inf"))
        next_best = tl.max(x, axis=0)
        next_token = tl.min(tl.where(left & (x == next_best), ids, V), axis=0)
        largest = tl.where(numbers == chunk, next_best, largest)
        firsts = tl.where(numbers == chunk, next_token, firsts)


@triton.jit
def _choose_kernel(
    searches,
    whole,
    R,
    tokens,
    log_probs,
    cum_log_probs,
    cache_indirection,
    context,
    choices,
    sampled,
    OFFERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The choice of one search."""
    search = tl.program_id(0)
    facts = searches + search * NUM_FACTS
    first_row = tl.load(facts + FIRST_ROW)
    num_rows = tl.load(facts + NUM_ROWS).to(tl.int32)
    width = tl.load(facts + WIDTH).to(tl.int32)
    num_choices = tl.load(facts + NUM_CHOICES).to(tl.int32)
    rest_place = tl.load(facts + REST_PLACE)
    slot = tl.load(facts + SEARCH_SLOT)
    length = tl.load(facts + LENGTH)
    is_last = length < 0
    length = tl.where(is_last, -1 - length, length).to(tl.int32)
    rate = tl.load(facts + DIVERSITY_RATE).to(tl.float64, bitcast=True)

    numbers = tl.arange(0, OFFERS)
    beam, rank = numbers // num_choices, numbers % num_choices
    num_offers = num_rows * num_choices
    there = numbers < num_offers
    place = (search * MOST_BEAMS + beam) * MOST_CHOICES + rank
    token = tl.load(tokens + place, mask=there, other=0)
    log_prob = tl.load(log_probs + place, mask=there, other=0.0)
    totals = cum_log_probs + slot * MOST_BEAMS
    begins = num_rows < width  # the search does: nothing is kept of it yet
    total = tl.load(totals + beam, mask=there & (not begins), other=0.0) + log_prob.to(tl.float64)
    offer = tl.where(there, total + rate * rank.to(tl.float64), float("-inf"))
    ends = tl.zeros((OFFERS,), tl.int32) + is_last.to(tl.int32)
    for number in tl.static_range(MOST_END_IDS):
        ends = tl.where(token == tl.load(whole + (END_IDS + number) * R + first_row), 1, ends)

    # The beams that go on, by place.
    beams = tl.arange(0, MOST_BEAMS)
    parents = tl.zeros((MOST_BEAMS,), tl.int32)
    new_totals = tl.zeros((MOST_BEAMS,), tl.float64)
    num_going = tl.zeros((), tl.int32)
    num_ended = tl.zeros((), tl.int32)
    out = choices + search * CHOICE_INTS
    order = tl.zeros((), tl.int32)
    while (order < num_choices) & (num_going < width):
        best = tl.max(offer, axis=0)
        chosen = tl.min(tl.where((offer == best) & there, numbers, num_offers - 1), axis=0)
        is_chosen = numbers == chosen
        parent = chosen // num_choices
        its_token = tl.sum(tl.where(is_chosen, token, 0), axis=0)
        its_log_prob = tl.sum(tl.where(is_chosen, log_prob, 0.0), axis=0)
        its_total = tl.sum(tl.where(is_chosen, total, 0.0), axis=0)
        ended = tl.sum(tl.where(is_chosen, ends, 0), axis=0) > 0
        counted = ended & (order < width)
        row = tl.where(ended, MOST_BEAMS + num_ended, num_going)
        taken = counted | (not ended)
        tl.store(out + 2 + row * 3, parent, mask=taken)
        tl.store(out + 2 + row * 3 + 1, its_token, mask=taken)
        tl.store(out + 2 + row * 3 + 2, its_log_prob.to(tl.int32, bitcast=True), mask=taken)
        goes_on = (beams == num_going) & (not ended)
        parents = tl.where(goes_on, parent, parents)
        new_totals = tl.where(goes_on, its_total, new_totals)
        where = tl.where(num_going == 0, first_row, tl.where(begins, rest_place - 1, first_row) + num_going)
        tl.store(sampled + where, its_token, mask=not ended)
        num_going += tl.where(ended, 0, 1)
        num_ended += tl.where(counted, 1, 0)
        there = there & (numbers != chosen)
        offer = tl.where(is_chosen, float("-inf"), offer)
        order += 1
    tl.store(out, num_going)
    tl.store(out + 1, num_ended)

    tl.debug_barrier()  # all have read the totals
    tl.store(totals + beams, new_totals, mask=beams < num_going)
    for start in range(0, length + 1, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        kept = (beams < num_going)[:, None] & (columns < length)[None, :]
        rows = cache_indirection + slot * MOST_BEAMS * context
        owner = tl.load(rows + parents[:, None] * context + columns[None, :], mask=kept, other=0)
        own = tl.zeros((MOST_BEAMS, BLOCK), tl.int32) + beams[:, None]
        owner = tl.where((columns < length)[None, :], owner.to(tl.int32), own)
        tl.debug_barrier()  # what one thread overwrites, another may have to read first
        written = (beams < num_going)[:, None] & (columns <= length)[None, :]
        tl.store(rows + beams[:, None] * context + columns[None, :], owner.to(tl.uint8), mask=written)
