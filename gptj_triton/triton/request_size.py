"""How much a request holds, from the shapes of its tensors before their values. Of Triton only numpy.

Every model that can be asked directly begins with these checks, so that a request beyond the limits costs little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj_triton.limits import SPELLINGS, RequestLimits

Tensors = Mapping[str, NDArray[Any]]

WORD_BYTES = 4  # what a string's length takes on Triton's wire
ID_BYTES = 4


def check_size(tensors: Tensors, limits: RequestLimits) -> None:
    """Raise InvalidRequestError for too many rows, strings or bytes; tensors are [rows, …]."""
    for name, tensor in tensors.items():
        limits.check("max_request_rows", len(tensor), f"number of rows of {name}")
        if tensor.dtype == np.object_:
            limits.check("max_request_strings", tensor.size, f"number of strings of {name}")
    size = sum(map(_byte_size, tensors.values()))
    limits.check("max_request_bytes", size, "number of bytes of the request")


def check_sequences(sequences: int, tokens: int, limits: RequestLimits) -> None:
    """Raise InvalidRequestError for too many sequences of a request, or tokens of all of them together."""
    limits.check("max_request_sequences", sequences, "number of sequences of the request, all rows together")
    limits.check("max_request_tokens", tokens, "number of tokens of the request, prompts and new ones of all sequences")


def check_strings(name: str, words: NDArray[Any], limits: RequestLimits) -> None:
    """Raise InvalidRequestError for too long a list of words of one row, [words] bytes, empty ones counted."""
    limits.check("max_words", len(words), f"number of words of {name}")
    limits.check("max_word_bytes", sum(map(len, words.tolist())), f"number of bytes of {name}")


def check_ids(name: str, words: NDArray[Any], limits: RequestLimits) -> None:
    """The same for words as token ids, [2, W]: the ids end to end, and where each word ends, padded with -1."""
    count = int(np.count_nonzero(words[1] != -1))
    limits.check("max_words", count, f"number of words of {name}", SPELLINGS)
    limits.check("max_word_bytes", int(_numbers_of_ids(words[np.newaxis])[0]), f"number of ids of {name}", SPELLINGS)


def check_word_bytes(each: Iterable[int], limits: RequestLimits) -> None:
    """Raise InvalidRequestError for too many bytes of words in a request; `each` has those of every sequence."""
    limits.check("max_request_word_bytes", sum(each), "number of bytes of the request's stop and bad words")


def string_bytes(words: Iterable[bytes]) -> int:
    """What a list of words takes on Triton's wire."""
    return sum(WORD_BYTES + len(word) for word in words)


def id_bytes(words: Iterable[tuple[int, ...] | list[int]]) -> int:
    """The same of words as token ids."""
    return sum(ID_BYTES * len(word) for word in words)


def total_id_bytes(lists: NDArray[Any]) -> int:
    """The same of all rows' words, [rows, 2, W]."""
    return ID_BYTES * int(_numbers_of_ids(lists).sum())


def _numbers_of_ids(lists: NDArray[Any]) -> NDArray[Any]:
    """How many token ids each row's words have, [rows]: the end of its last word."""
    counts: NDArray[Any] = np.minimum(lists[:, 1].max(axis=1, initial=0), lists.shape[2])
    return counts


def _byte_size(tensor: NDArray[Any]) -> int:
    if tensor.dtype == np.object_:
        return string_bytes(tensor.ravel().tolist())
    return tensor.nbytes
