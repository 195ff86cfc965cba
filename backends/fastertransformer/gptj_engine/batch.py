"""One step's work: as plain data, the plan that all ranks are told, and as tensors, the batch that a rank computes.

Knows neither weights nor the cache's tensors. T tokens are packed without padding, sequence after sequence; those that
decode come first. P is the number of pages in a group's page table, C = P * page_size the context it covers.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import groupby

import msgspec
import torch
from torch import Tensor

from gptj_engine.kv_pages import PagePool
from gptj_engine.scheduler import Scheduled
from gptj_engine.sequence import Sequence


class GroupPlan(msgspec.Struct):
    """Sequences with equally many new tokens each, which attend together: P pages a table, `starts` the position of
    each sequence's first new token.
    """

    first_row: int
    num_tokens: int
    starts: list[int]
    tables: list[list[int]]


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


@dataclass(frozen=True)
class PageVectors:
    """The `head_pages` of a group as rows of single vectors, int32.

    `keys` [sequences * heads * P * head_size] of K seen as [pages * heads * head_size, page_size], `values` [sequences
    * heads * C] of V seen as [pages * heads * page_size, head_size].
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class AttentionGroup:
    """A GroupPlan on the device.

    `rows` are its sequences' among the T packed tokens. `head_pages` is int64 [sequences * heads * P]: for each
    sequence and head the rows of the cache, seen as [pages * heads, …], that hold its context in order. `mask` is
    float32 [sequences, 1, tokens each, C], 0 where a token sees a position and -inf where it does not. `vectors` are
    there where sequences decode on a CPU in float32.
    """

    rows: slice
    num_sequences: int
    num_pages: int
    head_pages: Tensor
    mask: Tensor
    vectors: PageVectors | None


@dataclass(frozen=True)
class Batch:
    """A StepPlan on the device. All tensors int64: `token_ids`, `positions`, `pages` and `slots` [T]; `last_rows`
    [samples].
    """

    token_ids: Tensor
    positions: Tensor
    pages: Tensor
    slots: Tensor
    groups: list[AttentionGroup]
    last_rows: Tensor


def plan_step(
    step: SequenceOf[Scheduled], pool: PagePool, sampled: SequenceOf[Sequence] = ()
) -> tuple[StepPlan, list[Sequence]]:
    """Pack a step, and take the page copies that wait; each scheduled sequence must own the pages of all its tokens.

    `sampled` are the sequences that the step before samples for, in order: the place of one among them stands for its
    token in flight. Returns with the plan the sequences of its `last_rows`, in the same order.
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
                plan.last_rows.append(len(plan.token_ids) - 1)
        plan.groups.append(group)
    return plan, [scheduled.sequence for scheduled in ordered if scheduled.samples]


def build_batch(
    plan: StepPlan, num_heads: int, head_size: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> Batch:
    """The plan as tensors, for a cache of `num_heads` heads of that type."""
    by_vector = dtype == torch.float32 and device.type == "cpu"
    packed = torch.tensor([plan.token_ids, plan.positions, plan.pages, plan.slots], device=device)
    return Batch(
        token_ids=packed[0],
        positions=packed[1],
        pages=packed[2],
        slots=packed[3],
        groups=[_build_group(group, num_heads, head_size, page_size, by_vector, device) for group in plan.groups],
        last_rows=torch.tensor(plan.last_rows, dtype=torch.int64, device=device),
    )


def _build_group(
    plan: GroupPlan, num_heads: int, head_size: int, page_size: int, by_vector: bool, device: torch.device
) -> AttentionGroup:
    tables = torch.tensor(plan.tables)
    num_sequences, num_pages = tables.shape
    head_pages = (tables[:, None] * num_heads + torch.arange(num_heads)[:, None]).flatten()
    mask = _causal_mask(plan.starts, plan.num_tokens, num_pages * page_size)
    vectors = None
    if by_vector and plan.num_tokens == 1:
        vectors = PageVectors(_vectors(head_pages, head_size), _vectors(head_pages, page_size))
    return AttentionGroup(
        rows=slice(plan.first_row, plan.first_row + num_sequences * plan.num_tokens),
        num_sequences=num_sequences,
        num_pages=num_pages,
        head_pages=head_pages.to(device),
        mask=mask.to(device),
        vectors=vectors,
    )


def _vectors(head_pages: Tensor, count: int) -> Tensor:
    """int32 [len(head_pages) * count]: the rows of what is in these pages when each holds `count` vectors."""
    first = head_pages.to(torch.int32)[:, None] * count
    return (first + torch.arange(count, dtype=torch.int32)).flatten()


def _group_key(scheduled: Scheduled, pool: PagePool) -> tuple[int, int, int]:
    """Tokens each, pages in the table, and for a prompt's chunk its own sequence: only single tokens share a group."""
    needed = pool.pages_for(scheduled.sequence.num_cached + scheduled.num_tokens)
    own_group = 0 if scheduled.num_tokens == 1 else id(scheduled.sequence)
    return scheduled.num_tokens, _table_size(needed), own_group


def _table_size(needed: int) -> int:
    """Pages of a table for `needed` pages: four sizes an octave, so that groups are few and gather little in vain."""
    grain = max(1, (1 << needed.bit_length()) // 8)
    return -(-needed // grain) * grain


def _causal_mask(starts: list[int], num_tokens: int, context: int) -> Tensor:
    """float32 [sequences, 1, num_tokens, context]: a token at position p sees positions 0 to p."""
    queries = torch.tensor(starts)[:, None] + torch.arange(num_tokens)
    hidden = torch.arange(context) > queries[..., None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
