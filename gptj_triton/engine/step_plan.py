"""One step's work as plain data: the plan that all ranks are given. Knows no tensors.

T tokens are packed without padding, sequence after sequence; those that decode come first. P is the number of pages in
a group's page table.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import groupby

import msgspec

from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Sequence


class GroupPlan(msgspec.Struct):
    """Sequences with equally many new tokens each, which attend together: P pages a table, `starts` the position of
    each sequence's first new token.
    """

    first_row: int
    num_tokens: int
    starts: list[int]
    tables: list[list[int]]


class SearchPlan(msgspec.Struct):
    """A search whose beams a GPU chooses: `width` rows side by side from `first_row` on, one new token each. `slot` is
    where the GPU keeps the search. Each row's table leads to pages of its own behind the `prompt_length` first tokens.
    """

    first_row: int
    width: int
    slot: int
    prompt_length: int


class StepPlan(msgspec.Struct):
    """What is computed: token ids, their positions, and the page and slot that takes the K and V of each, all [T].
    Instead of an id, -1 - i stands for the i-th token that the step before samples.

    `last_rows` are the rows whose logits are wanted; `copies` the pages, (from, to), to be copied before all else.
    """

    token_ids: list[int]
    positions: list[int]
    pages: list[int]
    slots: list[int]
    groups: list[GroupPlan]
    last_rows: list[int]
    copies: list[tuple[int, int]]
    searches: list[SearchPlan] = []


def plan_step(
    step: SequenceOf[Scheduled], pool: PagePool, sampled: SequenceOf[Sequence] = ()
) -> tuple[StepPlan, list[Sequence]]:
    """Pack a step, and take the page copies that wait; each scheduled sequence must own the pages of all its tokens.

    `sampled` are the sequences that the step before samples for, in order. A sequence at index i of it has a token in
    flight, which the plan writes as -1 - i. Returns with the plan the sequences of its `last_rows`, in the same order.
    """
    place = {id(sequence): index for index, sequence in enumerate(sampled)}
    ordered = sorted(step, key=lambda scheduled: _group_key(scheduled, pool))
    plan = StepPlan([], [], [], [], [], [], pool.copies[:])
    pool.copies.clear()
    for (num_tokens, table_size, _), members in groupby(ordered, key=lambda scheduled: _group_key(scheduled, pool)):
        group = GroupPlan(len(plan.token_ids), num_tokens, [], [])
        for scheduled in members:
            sequence, start = scheduled.sequence, scheduled.sequence.num_cached
            plan.token_ids += sequence.tokens(start, start + num_tokens)
            if sequence.in_flight:
                plan.token_ids.append(-1 - place[id(sequence)])
            for position in range(start, start + num_tokens):
                plan.positions.append(position)
                plan.pages.append(sequence.pages[position // pool.page_size])
                plan.slots.append(position % pool.page_size)
            group.tables.append(sequence.pages[:table_size] + [0] * (table_size - len(sequence.pages)))
            group.starts.append(start)
            if scheduled.samples:
                if sequence.keeps_pages and sequence is sequence.group[0]:
                    width, prompt_length = len(sequence.group), len(sequence.prompt)
                    plan.searches.append(
                        SearchPlan(len(plan.token_ids) - 1, width, sequence.search_slot, prompt_length)
                    )
                plan.last_rows.append(len(plan.token_ids) - 1)
        plan.groups.append(group)
    return plan, [scheduled.sequence for scheduled in ordered if scheduled.samples]


def _group_key(scheduled: Scheduled, pool: PagePool) -> tuple[int, int, int]:
    """Tokens each, pages in the table, and for a prompt's chunk its own sequence: only single tokens share a group."""
    needed = pool.pages_for(scheduled.sequence.num_cached + scheduled.num_tokens)
    own_group = 0 if scheduled.num_tokens == 1 else id(scheduled.sequence)
    return scheduled.num_tokens, _table_size(needed), own_group


def _table_size(needed: int) -> int:
    """Pages of a table for `needed` pages: four sizes an octave, so that groups are few and gather little in vain."""
    grain = max(1, (1 << needed.bit_length()) // 8)
    return -(-needed // grain) * grain
