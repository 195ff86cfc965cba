"""Postprocessing's tensors as sequences: each has its own row's values. What is refused: tests/server."""

from __future__ import annotations

import numpy as np
import pytest

from gptj_triton.errors import InvalidRequestError
from gptj_triton.triton.written_tokens import read_sequences

TENSORS = {
    "output_ids": np.arange(24, dtype=np.uint32).reshape(2, 2, 6),
    "sequence_length": np.array([[4, 6], [5, 3]], np.uint32),
    "input_lengths": np.array([[2], [3]], np.uint32),
    "end_id": np.array([[7], [8]], np.uint32),
}
OPTIONAL = {
    "previous_length": np.array([[3, 6], [3, 3]], np.uint32),
    "finish_reason": np.array([[b"", b"stop"], [b"length", b""]], np.object_),
    "stop_words": np.array([[b"a", b"b"], [b"c", b""]], np.object_),
    "exclude_input_in_output": np.array([[True], [False]]),
}


def test_end_ids_take_the_place_of_end_id() -> None:
    found = read_sequences(TENSORS | {"end_ids": np.array([[7, 5], [8, -1]], np.int32)}, vocab_size=24)
    assert [sequence.end_ids for sequence in found] == [[7, 5], [7, 5], [8, -1], [8, -1]]
    with pytest.raises(InvalidRequestError, match="row 1: end_ids is -2, allowed: token ids from 0 to 23"):
        read_sequences(TENSORS | {"end_ids": np.array([[7, 5], [-2, 8]], np.int32)}, vocab_size=24)


def test_each_sequence_has_its_own_tokens_and_its_rows_values() -> None:
    found = read_sequences(TENSORS | OPTIONAL, vocab_size=24)
    assert [sequence.ids.tolist() for sequence in found] == [
        [0, 1, 2, 3],
        [6, 7, 8, 9, 10, 11],
        [12, 13, 14, 15, 16],
        [18, 19, 20],
    ]
    assert [sequence[1:] for sequence in found] == [
        (2, 3, [7], [b"a", b"b"], "", False),
        (2, 6, [7], [b"a", b"b"], "stop", False),
        (3, 3, [8], [b"c", b""], "length", True),
        (3, 3, [8], [b"c", b""], "", True),
    ]


def test_what_is_absent_means_a_whole_answer_that_ended() -> None:
    for sequence in read_sequences(TENSORS, vocab_size=None):
        assert sequence.previous_length == sequence.prompt_length
        assert sequence[4:] == ([], "length", False)


def test_tokens_are_checked_where_the_vocabulary_is_known() -> None:
    with pytest.raises(InvalidRequestError, match="row 1: output_ids is 20, allowed: token ids from 0 to 19"):
        read_sequences(TENSORS, vocab_size=20)  # 21 is behind the end of its sequence
    with pytest.raises(InvalidRequestError, match="row 0: end_id is 24, allowed: token ids from 0 to 23"):
        read_sequences(TENSORS | {"end_id": np.array([[24], [8]], np.uint32)}, vocab_size=24)
