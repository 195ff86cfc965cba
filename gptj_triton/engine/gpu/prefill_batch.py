"""Packed chunks of prompts as one array of whole numbers, which the host fills and a step on the GPU reads.

Room for more tokens and chunks than there are is left inert: tokens at position -1, chunks without tokens, blocks of
such a chunk. Knows no kernel but how it cuts chunks into blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gptj_triton.engine.gpu.transfer import fill_page_tables
from gptj_triton.engine.step_plan import GroupPlan, StepPlan

Numbers = TypeVar("Numbers", Tensor, NDArray[np.int32])


@dataclass(frozen=True)
class PrefillShape:
    """Room for T tokens in S chunks of which L are sampled from, N blocks of queries, and P pages a table."""

    tokens: int
    chunks: int
    samples: int
    blocks: int
    pages: int

    @property
    def ends(self) -> list[int]:
        """Where each part of `PrefillBatch` ends. They begin at multiples of 16 bytes, because for pointers to any
        other place Triton compiles kernels of their own.
        """
        sizes = [self.tokens] * 4 + [self.chunks, self.chunks + 1, self.samples, 2 * self.blocks]
        return [*itertools.accumulate(-(-size // 4) * 4 for size in [*sizes, self.chunks * self.pages])]

    @property
    def size(self) -> int:
        return self.ends[-1]


@dataclass(frozen=True)
class PrefillBatch(Generic[Numbers]):
    """Views of int32 numbers [`PrefillShape.size`]."""

    tokens: Numbers  # [T]: ids, or -1 - i for the i-th token that the step before samples
    positions: Numbers  # [T]
    pages: Numbers  # [T], where the K and V of each go, with `slots`
    slots: Numbers  # [T]
    starts: Numbers  # [S], the chunks' first positions
    first_rows: Numbers  # [S + 1], their first tokens among the T, and the end of the last one
    last_rows: Numbers  # [L], the tokens from whose logits is sampled
    blocks: Numbers  # [N, 2], chunk and first token of each block of queries
    tables: Numbers  # [S, P], the pages of each chunk's sequence

    @staticmethod
    def split(numbers: Numbers, shape: PrefillShape) -> PrefillBatch[Numbers]:
        starts = [0, *shape.ends[:-1]]

        def part(index: int, *sizes: int) -> Numbers:
            return numbers[starts[index] : starts[index] + math.prod(sizes)].reshape(sizes)

        return PrefillBatch(
            tokens=part(0, shape.tokens),
            positions=part(1, shape.tokens),
            pages=part(2, shape.tokens),
            slots=part(3, shape.tokens),
            starts=part(4, shape.chunks),
            first_rows=part(5, shape.chunks + 1),
            last_rows=part(6, shape.samples),
            blocks=part(7, shape.blocks, 2),
            tables=part(8, shape.chunks, shape.pages),
        )


@dataclass(frozen=True)
class Chunks:
    """The chunks of a step, in the order of its plan: `starts` [S] are their first positions; `first_rows` [S + 1]
    their first tokens among the T, and T itself.
    """

    starts: list[int]
    first_rows: list[int]

    @classmethod
    def of(cls, groups: list[GroupPlan]) -> Chunks:
        lengths = (group.num_tokens for group in groups for _ in group.starts)
        return cls([start for group in groups for start in group.starts], [0, *itertools.accumulate(lengths)])

    @property
    def num_tokens(self) -> int:
        return self.first_rows[-1]


def pack_prefill(
    plan: StepPlan,
    groups: list[GroupPlan],
    chunks: Chunks,
    blocks: SequenceOf[tuple[int, int]],
    last_rows: list[int],
    shape: PrefillShape,
) -> NDArray[np.int32]:
    """`chunks` of `groups`, the last tokens of the plan; `last_rows` count from the first of them."""
    numbers = np.zeros(shape.size, np.int32)
    batch = PrefillBatch.split(numbers, shape)
    count = chunks.num_tokens
    batch.positions[count:] = -1
    for target, source in zip(
        (batch.tokens, batch.positions, batch.pages, batch.slots),
        (plan.token_ids, plan.positions, plan.pages, plan.slots),
        strict=True,
    ):
        target[:count] = source[-count:]
    batch.starts[: len(chunks.starts)] = chunks.starts
    batch.first_rows[:] = count
    batch.first_rows[: len(chunks.starts)] = chunks.first_rows[:-1]
    batch.last_rows[: len(last_rows)] = last_rows
    batch.blocks[:] = (shape.chunks - 1, count)
    batch.blocks[: len(blocks)] = blocks
    fill_page_tables(batch.tables, groups)
    return numbers
