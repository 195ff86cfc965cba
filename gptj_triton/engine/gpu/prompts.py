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

from gptj_triton.engine.step_plan import GroupPlan, StepPlan

Numbers = TypeVar("Numbers", Tensor, NDArray[np.int32])


@dataclass(frozen=True)
class PromptShape:
    """Room for T tokens in S chunks of which L are sampled from, N blocks of queries, and P pages a table."""

    tokens: int
    chunks: int
    samples: int
    blocks: int
    pages: int

    @property
    def ends(self) -> list[int]:
        """Where each part of `Prompts` ends. They begin at multiples of 16 bytes, because for pointers to any other
        place Triton compiles kernels of their own.
        """
        sizes = [self.tokens] * 4 + [self.chunks, self.chunks + 1, self.samples, 2 * self.blocks]
        return [*itertools.accumulate(-(-size // 4) * 4 for size in [*sizes, self.chunks * self.pages])]

    @property
    def size(self) -> int:
        return self.ends[-1]


@dataclass(frozen=True)
class Prompts(Generic[Numbers]):
    """Views of int32 numbers [`PromptShape.size`]."""

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
    def split(numbers: Numbers, shape: PromptShape) -> Prompts[Numbers]:
        starts = [0, *shape.ends[:-1]]

        def part(index: int, *sizes: int) -> Numbers:
            return numbers[starts[index] : starts[index] + math.prod(sizes)].reshape(sizes)

        return Prompts(
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


def pack_prompts(
    plan: StepPlan,
    groups: list[GroupPlan],
    first_row: int,
    blocks: SequenceOf[tuple[int, int]],
    last_rows: list[int],
    shape: PromptShape,
) -> NDArray[np.int32]:
    """The chunks of `groups`, from row `first_row` of the plan on, where `last_rows` count from."""
    numbers = np.zeros(shape.size, np.int32)
    prompts = Prompts.split(numbers, shape)
    count = len(plan.token_ids) - first_row
    prompts.positions[count:] = -1
    for target, source in zip(
        (prompts.tokens, prompts.positions, prompts.pages, prompts.slots),
        (plan.token_ids, plan.positions, plan.pages, plan.slots),
        strict=True,
    ):
        target[:count] = source[first_row:]
    starts = [start for group in groups for start in group.starts]
    prompts.starts[: len(starts)] = starts
    prompts.first_rows[:] = count
    prompts.first_rows[: len(starts)] = chunk_rows(groups)[:-1]
    prompts.last_rows[: len(last_rows)] = last_rows
    prompts.blocks[:] = (shape.chunks - 1, count)
    prompts.blocks[: len(blocks)] = blocks
    fill_tables(prompts.tables, groups)
    return numbers


def chunk_rows(groups: list[GroupPlan]) -> list[int]:
    """The first row of each chunk, and the end of the last one."""
    return [0, *itertools.accumulate(group.num_tokens for group in groups for _ in group.starts)]


def fill_tables(tables: NDArray[np.int32], groups: list[GroupPlan]) -> None:
    """Write the page tables of all groups, sequence after sequence, into the first rows of `tables` [S, P]."""
    row = 0
    for group in groups:
        part = np.array(group.tables, np.int32)[:, : tables.shape[1]]
        tables[row : row + len(part), : part.shape[1]] = part
        row += len(part)
