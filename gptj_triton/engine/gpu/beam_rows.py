"""Which rows of a decode step are beams of a search, as the attention reads it. Knows plans, no sequences."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from gptj_triton.engine.step_plan import SearchPlan

# Facts of a search, int32 [N, SEARCH_FACTS].
FIRST_ROW = tl.constexpr(0)
WIDTH = tl.constexpr(1)  # -1 where there is no search
SLOT = tl.constexpr(2)
PROMPT_LENGTH = tl.constexpr(3)
SEARCH_FACTS = tl.constexpr(4)


@dataclass(frozen=True)
class BeamRows:
    """`inputs` int32 are for a bucket of B rows: which search a row belongs to, [B], -1 for none; then the facts of as
    many searches as can be, [B / 2, SEARCH_FACTS]. `cache_indirection` is that of BeamState.
    """

    inputs: Tensor
    cache_indirection: Tensor


def beam_inputs_size(rows: int) -> int:
    """Numbers that `BeamRows.inputs` has for a bucket of `rows`."""
    return rows + rows // 2 * int(SEARCH_FACTS.value)


def beam_inputs(searches: SequenceOf[SearchPlan], rows: int) -> NDArray[np.int32]:
    """`BeamRows.inputs` for these searches."""
    inputs = np.full(beam_inputs_size(rows), -1, np.int32)
    facts = inputs[rows:].reshape(-1, SEARCH_FACTS.value)
    for number, search in enumerate(searches):
        inputs[search.first_row : search.first_row + search.width] = number
        facts[number] = (search.first_row, search.width, search.slot, search.prompt_length)
    return inputs
