"""Chunks of prompts as numbers that a step reads: what is there, and what room is left inert."""

from __future__ import annotations

import numpy as np

from gptj_triton.engine.gpu.prefill_attention import query_blocks
from gptj_triton.engine.gpu.prefill_batch import Chunks, PrefillBatch, PrefillShape, pack_prefill
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
    shape = PrefillShape(tokens=8, chunks=4, samples=3, blocks=5, pages=3)
    chunks = Chunks.of(groups)
    assert chunks == Chunks([0, 16], [0, 2, 5])
    blocks = query_blocks(chunks.starts, chunks.first_rows, 2)
    batch = PrefillBatch.split(pack_prefill(PLAN, groups, chunks, blocks, [1], shape), shape)
    assert batch.tokens.tolist() == [10, 11, -1, 21, 22, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 16, 17, 18, -1, -1, -1]
    assert batch.pages[:5].tolist() == [5, 5, 7, 7, 7]
    assert batch.slots[:5].tolist() == [0, 1, 0, 1, 2]
    assert batch.starts[:2].tolist() == [0, 16]
    assert batch.first_rows.tolist() == [0, 2, 5, 5, 5]
    assert batch.last_rows[0] == 1
    assert batch.blocks.tolist() == [[1, 4], [1, 2], [0, 0], [3, 5], [3, 5]]
    assert batch.tables[:2].tolist() == [[5, 0, 0], [6, 7, 0]]
    chunk, row = batch.blocks[-1]
    assert batch.first_rows[chunk + 1] == row and batch.starts[chunk] == 0, "a block of no tokens, without context"


def test_parts_have_places_of_their_own_that_begin_at_multiples_of_16_bytes() -> None:
    shape = PrefillShape(tokens=5, chunks=3, samples=1, blocks=3, pages=7)
    batch = PrefillBatch.split(np.arange(shape.size, dtype=np.int32), shape)
    parts = [batch.tokens, batch.positions, batch.pages, batch.slots, batch.starts, batch.first_rows]
    parts += [batch.last_rows, batch.blocks, batch.tables]
    numbers = np.concatenate([part.ravel() for part in parts])
    assert sorted(set(numbers)) == sorted(numbers)
    assert all(part.ravel()[0] % 4 == 0 for part in parts)
    assert batch.blocks.shape == (3, 2) and batch.tables.shape == (3, 7)
