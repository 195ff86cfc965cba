"""One step's work as tensors: the packed tokens of many sequences, and where each reads and writes the KV cache.

Knows neither weights nor the cache's tensors. T tokens are packed without padding, sequence after sequence; those that
decode come first. P is the number of pages in a group's page table, C = P * page_size the context it covers.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from gptj_engine.kv_pages import PagePool
from gptj_engine.scheduler import Scheduled
from gptj_engine.sequence import Sequence


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences with equally many new tokens each, which attend together.

    `rows` are theirs among the T packed tokens. `head_pages` is int64 [sequences * heads * P]: for each sequence and
    head the rows of the cache, seen as [pages * heads, …], that hold its context in order. `mask` is float32
    [sequences, 1, tokens each, C], 0 where a token sees a position and -inf where it does not.
    """

    rows: slice
    num_sequences: int
    num_pages: int
    head_pages: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Batch:
    """All tensors int64: `token_ids`, `positions`, `pages` and `slots` (where K and V are written) [T]; `last_rows`
    [samples].

    `last_rows` are the rows whose logits are wanted, those of `sampling` in the same order.
    """

    token_ids: Tensor
    positions: Tensor
    pages: Tensor
    slots: Tensor
    groups: list[AttentionGroup]
    last_rows: Tensor
    sampling: list[Sequence]


def build_batch(step: SequenceOf[Scheduled], pool: PagePool, num_heads: int, device: torch.device) -> Batch:
    """Pack a step; each scheduled sequence must own the pages of all its tokens."""
    ordered = sorted(step, key=lambda scheduled: _group_key(scheduled, pool))
    token_ids: list[int] = []
    positions: list[int] = []
    pages: list[int] = []
    slots: list[int] = []
    last_rows: list[int] = []
    groups: list[AttentionGroup] = []
    for (num_tokens, table_size, _), members in groupby(ordered, key=lambda scheduled: _group_key(scheduled, pool)):
        first_row = len(token_ids)
        tables, starts = [], []
        for scheduled in members:
            sequence, start = scheduled.sequence, scheduled.sequence.num_cached
            token_ids += sequence.tokens(start, start + num_tokens)
            for position in range(start, start + num_tokens):
                positions.append(position)
                pages.append(sequence.pages[position // pool.page_size])
                slots.append(position % pool.page_size)
            tables.append(sequence.pages[:table_size] + [0] * (table_size - len(sequence.pages)))
            starts.append(start)
            if scheduled.samples:
                last_rows.append(len(token_ids) - 1)
        rows = slice(first_row, len(token_ids))
        head_pages = torch.tensor(tables)[:, None] * num_heads + torch.arange(num_heads)[:, None]
        mask = _causal_mask(starts, num_tokens, table_size * pool.page_size)
        groups.append(AttentionGroup(rows, len(tables), table_size, head_pages.flatten().to(device), mask.to(device)))
    packed = torch.tensor([token_ids, positions, pages, slots], device=device)
    return Batch(
        token_ids=packed[0],
        positions=packed[1],
        pages=packed[2],
        slots=packed[3],
        groups=groups,
        last_rows=torch.tensor(last_rows, dtype=torch.int64, device=device),
        sampling=[scheduled.sequence for scheduled in ordered if scheduled.samples],
    )


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
