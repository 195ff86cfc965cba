"""Token ids to FasterTransformer's tensors. Pure numpy; knows neither Triton nor the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray


def pad_right(rows: Sequence[Sequence[int]], fill: Sequence[int]) -> NDArray[np.uint32]:
    """Rows of token ids as one tensor [B, L] UINT32, row i filled up with fill[i]."""
    width = max(len(row) for row in rows)
    return np.array([[*row, *[fill[i]] * (width - len(row))] for i, row in enumerate(rows)], dtype=np.uint32)


def column(values: Sequence[float], dtype: DTypeLike) -> NDArray[np.generic]:
    """One value a row, [B, 1]."""
    return np.array(values, dtype=dtype)[:, np.newaxis]


def seeds(given: Sequence[int | None]) -> NDArray[np.uint64]:
    """Seeds, [B, 1] UINT64; a row without one draws its own, so that no two rows sample alike."""
    drawn = [int.from_bytes(os.urandom(8), "little") if seed is None else seed for seed in given]
    return np.array(drawn, dtype=np.uint64)[:, np.newaxis]


def word_lists(rows: Sequence[Sequence[Sequence[int]]]) -> NDArray[np.int32]:
    """Banned or stop sequences in FasterTransformer's layout, [B, 2, W] INT32.

    `rows`: for each row its sequences of token ids. [b, 0] holds the ids of all sequences end to end, padded with 0;
    [b, 1] the offset at which each sequence ends, padded with -1 (FasterTransformer, utils/word_list.cc).
    """
    width = max(1, *(sum(len(ids) for ids in sequences) for sequences in rows))
    lists = np.zeros((len(rows), 2, width), dtype=np.int32)
    lists[:, 1] = -1
    for row, sequences in zip(lists, rows, strict=True):
        flat = [token for ids in sequences for token in ids]
        row[0, : len(flat)] = flat
        row[1, : len(sequences)] = np.cumsum([len(ids) for ids in sequences])
    return lists
