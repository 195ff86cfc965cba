"""One step as tensors on a device: the batch that a rank computes. Knows neither weights nor the cache's tensors.

T tokens are packed without padding, sequence after sequence; those that decode come first. P is the number of pages in
a group's page table, C = P * page_size the context it covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptj_triton.engine.step_plan import GroupPlan, StepPlan


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


def _causal_mask(starts: list[int], num_tokens: int, context: int) -> Tensor:
    """float32 [sequences, 1, num_tokens, context]: a token at position p sees positions 0 to p."""
    queries = torch.tensor(starts)[:, None] + torch.arange(num_tokens)
    hidden = torch.arange(context) > queries[..., None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
