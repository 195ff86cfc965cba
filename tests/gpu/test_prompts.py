"""Chunks of prompts as numbers that a step reads: what is there, and what room is left inert."""

from __future__ import annotations

import numpy as np

from gptj_triton.engine.gpu.prefill_attention import query_blocks
from gptj_triton.engine.gpu.prompts import Prompts, PromptShape, chunk_rows, pack_prompts
from gptj_triton.engine.step_plan import GroupPlan, StepPlan

# One sequence decodes; a chunk of two tokens ends its prompt, one of three continues a longer one.
PLAN = StepPlan(
    token_ids=[9, 10, 11, -1, 21, 22],
    positions=[40, 0, 1, 16, 17, 18],
    pages=[3, 5, 5, 7, 7, 7],
    slots=[8, 0, 1, 0, 1, 2],
    groups=[GroupPlan(0, 1, [40], [[1, 2, 3]]), GroupPlan(1, 2, [0], [[5]]), GroupPlan(3, 3, [16], [[6, 7]])],
    last_rows=[0, 2],
    copies=[],
)


def test_chunks_are_packed_behind_those_that_decode_and_room_is_inert() -> None:
    groups = PLAN.groups[1:]
    shape = PromptShape(tokens=8, chunks=4, samples=3, blocks=5, pages=3)
    blocks = query_blocks([0, 16], chunk_rows(groups), 2)
    prompts = Prompts.split(pack_prompts(PLAN, groups, 1, blocks, [1], shape), shape)
    assert prompts.tokens.tolist() == [10, 11, -1, 21, 22, 0, 0, 0]
    assert prompts.positions.tolist() == [0, 1, 16, 17, 18, -1, -1, -1]
    assert prompts.pages[:5].tolist() == [5, 5, 7, 7, 7]
    assert prompts.slots[:5].tolist() == [0, 1, 0, 1, 2]
    assert prompts.starts[:2].tolist() == [0, 16]
    assert prompts.first_rows.tolist() == [0, 2, 5, 5, 5]
    assert prompts.last_rows[0] == 1
    assert prompts.blocks.tolist() == [[1, 4], [1, 2], [0, 0], [3, 5], [3, 5]]
    assert prompts.tables[:2].tolist() == [[5, 0, 0], [6, 7, 0]]
    chunk, row = prompts.blocks[-1]
    assert prompts.first_rows[chunk + 1] == row and prompts.starts[chunk] == 0, "a block of no tokens, without context"


def test_parts_have_places_of_their_own_that_begin_at_multiples_of_16_bytes() -> None:
    shape = PromptShape(tokens=5, chunks=3, samples=1, blocks=3, pages=7)
    prompts = Prompts.split(np.arange(shape.size, dtype=np.int32), shape)
    parts = [prompts.tokens, prompts.positions, prompts.pages, prompts.slots, prompts.starts, prompts.first_rows]
    parts += [prompts.last_rows, prompts.blocks, prompts.tables]
    numbers = np.concatenate([part.ravel() for part in parts])
    assert sorted(set(numbers)) == sorted(numbers)
    assert all(part.ravel()[0] % 4 == 0 for part in parts)
    assert prompts.blocks.shape == (3, 2) and prompts.tables.shape == (3, 7)
