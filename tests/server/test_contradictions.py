"""Steps that are asked directly: tensors that contradict each other are refused by name, and the step goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from tests.server.test_outputs import Arrays, Asker


def u32(values: Any) -> NDArray[Any]:
    return np.array(values, np.uint32)


def i32(values: Any) -> NDArray[Any]:
    return np.array(values, np.int32)


def text(values: Any) -> NDArray[Any]:
    return np.array(values, np.object_)


WHOLE = {
    "output_ids": u32([[[5, 6, 7, 8, 9]]]),
    "sequence_length": u32([[4]]),
    "input_lengths": u32([[2]]),
    "end_id": u32([[0]]),
}
TWO_ROWS = {name: np.concatenate([array, array]) for name, array in WHOLE.items()}
PROMPT = {"input_ids": u32([[5, 6, 7]]), "input_lengths": u32([[3]]), "request_output_len": u32([[2]])}
GOOD = {"postprocessing": WHOLE, "fastertransformer": PROMPT, "preprocessing": {"text_input": text([[b"Once"]])}}
BIG = 2**32 - 1

POSTPROCESSING: list[tuple[Arrays, str]] = [
    # One tensor says how many sequences a row has, and another says otherwise.
    (
        {"sequence_length": u32([[4] * 5])},
        "sequence_length is 5 values a row, allowed: 1, one for each sequence of output_ids",
    ),
    ({"sequence_length": u32([[]])}, "sequence_length is 0 values a row, allowed: 1"),
    ({"finish_reason": text([[b"stop"] * 2])}, "finish_reason is 2 values a row, allowed: 1"),
    ({"finish_reason": text(np.empty((1, 0)))}, "finish_reason is 0 values a row, allowed: 1"),
    ({"previous_length": u32([[2, 2]])}, "previous_length is 2 values a row, allowed: 1"),
    ({"cancel_handle": text([[b"a", b"b", b"c"]])}, "cancel_handle is 3 values a row, allowed: 1"),
    ({"output_ids": u32(np.empty((1, 0, 0)))}, "output_ids is 0 sequences a row, allowed: 1 or more"),
    ({"output_ids": u32(np.empty((1, 0, 0))), "sequence_length": u32([[]])}, "output_ids is 0 sequences a row"),
    # Lengths that point beyond what there is.
    ({"sequence_length": u32([[6]])}, "sequence_length is 6, allowed: 0 to 5, the width of output_ids"),
    ({"sequence_length": u32([[BIG]])}, f"sequence_length is {BIG}, allowed: 0 to 5"),
    ({"output_ids": u32(np.empty((1, 1, 0)))}, "sequence_length is 4, allowed: 0 to 0"),
    ({"input_lengths": u32([[5]])}, "input_lengths is 5, allowed: 0 to 4, the shortest sequence_length"),
    ({"previous_length": u32([[1]])}, "previous_length is 1, allowed: 2 to 4, from input_lengths to sequence_length"),
    ({"previous_length": u32([[5]])}, "previous_length is 5, allowed: 2 to 4"),
    # Values that mean nothing.
    ({"end_id": u32([[BIG]])}, f"end_id is {BIG}, allowed: token ids from 0 to"),
    ({"end_ids": i32([[0, -5]])}, "end_ids is -5, allowed: token ids from 0 to 4095"),
    ({"output_ids": u32([[[5, 6, BIG, 8]]])}, f"output_ids is {BIG}, allowed: token ids from 0 to 4095"),
    ({"finish_reason": text([[b"st\xffop"]])}, r"finish_reason is b'st\xffop', allowed: UTF-8"),
    # Of several rows, the row is named.
    (TWO_ROWS | {"sequence_length": u32([[4], [9]])}, "row 1: sequence_length is 9, allowed: 0 to 5"),
    (TWO_ROWS | {"input_lengths": u32([[4], [5]])}, "row 1: input_lengths is 5, allowed: 0 to 4"),
    (TWO_ROWS | {"end_id": u32([[4], [BIG]])}, f"row 1: end_id is {BIG}, allowed: "),
    (TWO_ROWS | {"finish_reason": text([[b"stop"], [b"\xc3"]])}, r"row 1: finish_reason is b'\xc3', allowed: UTF-8"),
    # Triton's own words.
    (TWO_ROWS | {"sequence_length": u32([[4]])}, "sequence_length"),
    ({"output_ids": u32([[5, 6, 7]])}, "output_ids"),
    ({"end_id": u32([[0, 0]])}, "end_id"),
]
FASTERTRANSFORMER: list[tuple[Arrays, str]] = [
    ({"input_lengths": u32([[4]])}, "input_lengths is 4, allowed: 0 to 3"),
    ({"request_output_len": u32([[2, 2]])}, "request_output_len is 2 values, allowed: one value a row"),
    ({"request_output_len": u32([[]])}, "request_output_len is 0 values, allowed: one value a row"),
    ({"input_ids": u32([[BIG] * 3])}, f"input_ids is {BIG}, allowed: token ids from 0 to"),
    ({"end_id": u32([[BIG]])}, f"end_id is {BIG}, allowed: "),
    ({"end_ids": i32([[7, -5]])}, "end_ids is -5, allowed: "),
    ({"start_id": u32([[BIG]]), "input_lengths": u32([[0]])}, f"start_id is {BIG}, allowed: "),
    ({"bad_words_list": i32([[[5], [2]]])}, "bad_words_list is an end offset of 2, allowed: 0 to 1, then -1"),
    ({"bad_words_list": i32([[[5, 6], [2, 1]]])}, "bad_words_list is an end offset of 1, allowed: 2 to 2, then -1"),
    ({"stop_words_list": i32([[[-7], [1]]])}, "stop_words_list is -7, allowed: token ids from 0 to"),
    ({"input_ids": u32([[[5, 6, 7]]])}, "input_ids"),
]
PREPROCESSING: list[tuple[Arrays, str]] = [
    ({"text_input": text([[b"Once\xff"]])}, "text_input has the byte 0xff at position 4; it must be valid UTF-8"),
    ({"max_tokens": i32([[1, 2]])}, "max_tokens"),
    ({"max_tokens": i32([[1], [2]])}, "max_tokens has 2 rows; it must have 1, as text_input has"),
    ({"text_input": text([[b"Once", b"upon"]])}, "text_input"),
]
CASES = [("postprocessing", *case) for case in POSTPROCESSING]
CASES += [("fastertransformer", *case) for case in FASTERTRANSFORMER]
CASES += [("preprocessing", *case) for case in PREPROCESSING]


@pytest.fixture
def asker(server: Any) -> Iterator[Asker]:
    asker = Asker(tritonclient.http, server.http_url)
    yield asker
    asker.client.close()


@pytest.mark.parametrize(("model", "change", "message"), CASES, ids=[case[-1] for case in CASES])
def test_a_tensor_that_contradicts_the_others_is_named(asker: Asker, model: str, change: Arrays, message: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        asker.ask(model, GOOD[model] | change)
    assert message in caught.value.message()
    assert caught.value.status() == "400"
    assert ".py" not in caught.value.message()
    asker.ask(model, GOOD[model])


@pytest.mark.parametrize(
    ("model", "missing"),
    [*(("postprocessing", name) for name in WHOLE), *(("fastertransformer", name) for name in PROMPT)],
)
def test_a_tensor_that_is_missing_among_others_is_named(asker: Asker, model: str, missing: str) -> None:
    """Triton only counts the tensors: an optional one passes for one that is required."""
    optional = {"postprocessing": {"previous_length": u32([[2]])}, "fastertransformer": {"start_id": u32([[1]])}}
    given = {name: array for name, array in (GOOD[model] | optional[model]).items() if name != missing}
    with pytest.raises(InferenceServerException, match=f"{missing} is missing, allowed: a request that has") as caught:
        asker.ask(model, given)
    assert caught.value.status() == "400"
    asker.ask(model, GOOD[model])


@pytest.mark.parametrize("handle", [b"", b"nonsense", b"\xff" * 1000, "é".encode()])
def test_a_cancel_handle_that_is_none_changes_nothing(asker: Asker, handle: bytes) -> None:
    answer = asker.ask("postprocessing", WHOLE | {"cancel_handle": text([[handle]])})
    assert answer["text_output"].tolist() == asker.ask("postprocessing", WHOLE)["text_output"].tolist()


@pytest.mark.parametrize("model", GOOD)
def test_a_request_without_rows_is_refused(asker: Asker, model: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        asker.ask(model, {name: array[:0] for name, array in GOOD[model].items()})
    assert ".py" not in caught.value.message()
    asker.ask(model, GOOD[model])
