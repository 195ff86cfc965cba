"""Tensors that preprocessing keeps for the next requests say what each request asked for, however many there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tritonclient.http

KEPT = 256  # by preprocessing, at most
FIELDS = {"max_tokens": np.int32, "min_tokens": np.int32, "top_k": np.int32, "top_p": np.float32}
OUTPUTS = {
    "max_tokens": "request_output_len",
    "min_tokens": "min_length",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
}


@pytest.fixture
def client(server: Any) -> Any:
    with tritonclient.http.InferenceServerClient(server.http_url) as connection:
        yield connection


def ask(client: Any, words: list[str] | None = None, **fields: list[float]) -> dict[str, list[Any]]:
    """What preprocessing makes of one row for each value of a field: the outputs of `fields`, and the bad words."""
    rows = len(next(iter(fields.values())))
    arrays = {name: np.array(values, FIELDS[name]).reshape(rows, 1) for name, values in fields.items()}
    arrays["text_input"] = np.full((rows, 1), b"Once upon a time", np.object_)
    if words:
        arrays["bad_words"] = np.array([[word.encode() for word in words]] * rows, np.object_)
    inputs = []
    for name, array in arrays.items():
        datatype = {np.object_: "BYTES", np.int32: "INT32", np.float32: "FP32"}[array.dtype.type]
        inputs.append(tritonclient.http.InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array)
    result = client.infer("preprocessing", inputs)
    answer = {name: result.as_numpy(OUTPUTS[name]).ravel().tolist() for name in fields}
    return answer | {"bad_words": result.as_numpy("bad_words_list").tolist()}


def test_more_different_requests_than_tensors_are_kept_get_their_own_values(client: Any) -> None:
    values = [*range(1, KEPT + 20), *range(1, 20)]
    for value in values:
        assert ask(client, max_tokens=[value])["max_tokens"] == [value]
    assert ask(client, max_tokens=[3, 2, 3])["max_tokens"] == [3, 2, 3]


def test_equal_values_of_different_fields_keep_their_types_and_rows(client: Any) -> None:
    for value in (1, 0, 1):
        answer = ask(client, max_tokens=[1], min_tokens=[value], top_k=[value], top_p=[float(value)])
        assert (answer["max_tokens"], answer["min_tokens"], answer["top_k"]) == ([1], [value], [value])
        assert answer["top_p"] == [value] and isinstance(answer["top_p"][0], float)


def test_words_of_one_request_are_not_those_of_the_next(client: Any) -> None:
    none = ask(client, max_tokens=[1, 1])["bad_words"]
    assert none == [[[0], [-1]]] * 2
    assert ask(client, ["wolf"], max_tokens=[1, 1])["bad_words"] != none
    assert ask(client, max_tokens=[1, 1])["bad_words"] == none
    assert ask(client, max_tokens=[1])["bad_words"] == none[:1]
