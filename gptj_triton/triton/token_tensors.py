"""Token ids to FasterTransformer's tensors. Pure numpy; knows neither Triton nor the tokenizer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray


def pad_right(rows: Sequence[Sequence[int]], fill: Sequence[int]) -> NDArray[np.uint32]:
    """Rows of token ids as one tensor [B, L] UINT32, row i filled up with fill[i]."""
    width = max(len(row) for row in rows)
    return np.array([_filled(row, fill[i], width) for i, row in enumerate(rows)], dtype=np.uint32)


def column(values: Sequence[float], dtype: DTypeLike) -> NDArray[np.generic]:
    """One value a row, [B, 1]."""
    return np.array(values, dtype=dtype)[:, np.newaxis]


def seeds(given: Sequence[int | None]) -> NDArray[np.uint64]:
    """Seeds, [B, 1] UINT64; a row without one draws its own, so that no two rows sample alike."""
    drawn = [int.from_bytes(os.urandom(8), "little") if seed is None else seed for seed in given]
    return np.array(drawn, dtype=np.uint64)[:, np.newaxis]


def needs_end_ids(rows: Iterable[Sequence[int]]) -> bool:
    """Whether the tensor end_id does not say the end ids of all rows: one has several, or none."""
    return any(len(ids) != 1 for ids in rows)


def end_id_lists(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """The end ids of each row, [B, E] INT32, padded with -1."""
    width = max(1, *map(len, rows))
    return np.array([_filled(ids, -1, width) for ids in rows], dtype=np.int32)


def word_lists(rows: Sequence[Sequence[Sequence[int]]]) -> NDArray[np.int32]:
    """Banned or stop sequences in FasterTransformer's layout, [B, 2, W] INT32.

    `rows`: for each row its sequences of token ids. [b, 0] holds the ids of all sequences end to end, padded with 0;
    [b, 1] the offset at which each sequence ends, padded with -1 (FasterTransformer, utils/word_list.cc).
    """
    tokens = [list(itertools.chain(*sequences)) for sequences in rows]
    ends = [list(itertools.accumulate(map(len, sequences))) for sequences in rows]
    width = max(1, *map(len, tokens))
    padded = [[_filled(ids, 0, width), _filled(offsets, -1, width)] for ids, offsets in zip(tokens, ends, strict=True)]
    return np.array(padded, dtype=np.int32)


def _filled(values: Sequence[int], fill: int, width: int) -> list[int]:
    return [*values, *[fill] * (width - len(values))]
