"""Attention of sequences that decode on a CPU gives, in place, the bits of the products that prompts are made with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.eager.attention import attend
from gptj_triton.engine.eager.batch import build_batch
from gptj_triton.engine.kv_cache import PAGE_SIZE, KVCache
from gptj_triton.engine.step_plan import GroupPlan, StepPlan

CPU = torch.device("cpu")
PAGES = 100


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("head_size", [16, 64, 256])
@pytest.mark.parametrize("lengths", [[1], [16, 3, 9], [240, 256], [257, 270], [700, 689]], ids=str)
def test_the_context_is_summed_in_place_bit_for_bit(lengths: list[int], head_size: int, heads: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig(100, 1024, heads * head_size, 64, 1, heads, 8, 1e-5, 0, (0,))
    cache = KVCache(config, PAGES, torch.float32, CPU)
    cache.keys.normal_()
    cache.values.normal_()
    width = -(-max(lengths) // PAGE_SIZE)
    order = torch.randperm(PAGES).tolist()
    tables = [order[row * width : (row + 1) * width] for row in range(len(lengths))]
    starts = [length - 1 for length in lengths]
    nothing = [0] * len(lengths)
    plan = StepPlan(nothing, starts, nothing, nothing, [GroupPlan(0, 1, starts, tables)], [], [])
    batch = build_batch(plan, heads, head_size, PAGE_SIZE, torch.float32, CPU)
    [group] = batch.groups
    assert group.vectors is not None
    query = torch.randn(len(lengths), heads, head_size)
    in_place = attend(cache, 0, batch, query)
    gathered = attend(cache, 0, replace(batch, groups=[replace(group, vectors=None)]), query)
    assert torch.equal(in_place, gathered)
    assert in_place.shape == query.shape and in_place.abs().max() > 0
