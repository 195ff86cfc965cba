"""Bad input gets a clear error, and the server goes on: after each of them a normal request is answered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

PROMPT = {"text_input": "Once upon a time", "max_tokens": 3}


def generate(server: Any, body: dict[str, Any] | bytes) -> requests.Response:
    url = f"http://{server.http_url.removeprefix('http://')}/v2/models/ensemble/generate"
    data = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(url, data=data, timeout=60)


def refusal(server: Any, body: dict[str, Any] | bytes) -> str:
    """The message of the 400 that `body` gets."""
    response = generate(server, body)
    assert response.status_code == 400, response.text
    message: str = response.json()["error"]
    return message


@pytest.fixture(autouse=True)
def a_normal_request_works_afterwards(server: Any) -> Iterator[None]:
    yield
    response = generate(server, PROMPT)
    assert response.status_code == 200, response.text
    assert response.json()["text_output"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_input": ""}, "text_input is empty; it must have at least one character"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number, 1 or more"),
        ({"max_tokens": -5}, "max_tokens is -5; it must be a whole number, 1 or more"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be a whole number, 0 or more"),
        ({"min_tokens": 4}, "min_tokens is 4; it must be from 0 to max_tokens, here 3"),
        ({"min_length": 4}, "min_length is 4; it must be from 0 to max_tokens, here 3"),
        ({"min_length": -1}, "min_length is -1; it must be a whole number, 0 or more"),
        (
            {"min_tokens": 1, "min_length": 2},
            "min_tokens is 1 and min_length, its other name, is 2; they must be equal",
        ),
        ({"temperature": -1}, "temperature is -1; it must be a finite number, 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number, 0 or more"),
        ({"temperature": 1e39}, "temperature is inf; it must be a finite number, 0 or more"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number, 0 or more"),
        ({"top_p": -0.5}, "top_p is -0.5; it must be a finite number from 0 to 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be a finite number from 0 to 1"),
        ({"top_p": float("nan")}, "top_p is nan; it must be a finite number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a finite number from 0.001 to 1000"),
        (
            {"repetition_penalty": float("nan")},
            "repetition_penalty is nan; it must be a finite number from 0.001 to 1000",
        ),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf; it must be a finite number from -1000 to 1000"),
        (
            {"frequency_penalty": float("nan")},
            "frequency_penalty is nan; it must be a finite number from -1000 to 1000",
        ),
        ({"length_penalty": float("nan")}, "length_penalty is nan; it must be a finite number from -10 to 10"),
        ({"beam_width": 0}, "beam_width is 0; it must be a whole number from 1 to 64"),
        ({"num_return_sequences": 65}, "num_return_sequences is 65; it must be a whole number from 1 to 64"),
        ({"end_id": -1}, "end_id is -1; it must be a whole number, 0 or more"),
        ({"seed": 1, "random_seed": 2}, "seed is 1 and random_seed, its other name, is 2; they must be equal"),
        (
            {"stream": True},
            "stream is true; it must be false, because `ensemble` answers once: use `ensemble_stream`, or have the "
            "server started with --streaming-ensemble",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_refused_by_field_value_and_range(server: Any, fields: dict[str, Any], message: str) -> None:
    assert refusal(server, {**PROMPT, **fields}).endswith(f", {message}")


def test_a_missing_text_input_is_refused_in_words(server: Any) -> None:
    assert "text_input is missing; it must be a prompt of at least one character" in refusal(server, {"max_tokens": 3})


@pytest.mark.parametrize("field", ["end_id", "pad_id"])
def test_a_token_outside_the_vocabulary_is_refused(server: Any, field: str) -> None:
    message = refusal(server, {**PROMPT, field: 10**9})
    assert re.search(rf"{field} is 1000000000; it must be a token of the vocabulary, from 0 to \d+$", message)


def test_max_tokens_beyond_the_context_is_refused_with_the_numbers(server: Any) -> None:
    message = refusal(server, {**PROMPT, "max_tokens": 100_000})
    numbers = re.search(
        r"max_tokens is 100000; it must be from 1 to (\d+), because text_input is (\d+) tokens long "
        r"and the context holds (\d+) tokens",
        message,
    )
    assert numbers, message
    most, prompt, context = map(int, numbers.groups())
    assert most + prompt == context
    assert "max_tokens is" in refusal(server, {**PROMPT, "max_tokens": most + 1})
    assert generate(server, {**PROMPT, "max_tokens": most, "stop_words": [" "]}).status_code == 200


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(server: Any) -> None:
    message = refusal(server, {"text_input": "a b " * 600, "max_tokens": 1})
    assert re.search(r"text_input is \d+ tokens long; it must be from 1 to \d+, because the context holds \d+", message)


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "once upon " * 100_000, "\U0001f600" * 250_000])
def test_a_prompt_of_a_megabyte_is_refused_with_the_numbers(server: Any, text: str) -> None:
    message = refusal(server, {"text_input": text, "max_tokens": 1})
    assert re.search(r"text_input is \d+ (bytes|tokens) long; it must be (at most|from 1 to) \d+", message)


def test_a_stop_word_of_a_megabyte_is_refused(server: Any) -> None:
    message = refusal(server, {**PROMPT, "stop_words": ["a" * 1_000_000]})
    assert message.endswith("number of bytes of stop_words is 1000000, allowed: 0 to 65536 (limit max_word_bytes)")


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "a\x00b",
        "\x01\x02\x1b[2J\x7f",
        "\r\n\t",
        " ",
        "\u200b\ufeff\u202e",
        "\ufffd\uffff",
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "שלום עולם",
        "مرحبا بالعالم",
        "昔々あるところに",
        "e\u0301" * 20,
        "<|endoftext|>",
        "'; DROP TABLE tales; --",
        "{{7*7}} %s %n \\",
    ],
    ids=ascii,
)
def test_unusual_text_is_answered(server: Any, text: str) -> None:
    response = generate(server, {"text_input": text, "max_tokens": 3, "exclude_input_in_output": False})
    assert response.status_code == 200, response.text
    assert response.json()["text_output"].startswith(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"text_input": "a\xff\xfeb"}', "text_input has the byte 0xff at position 1; it must be valid UTF-8"),
        (b'{"text_input": "a", "stop_words": ["\xc3"]}', "stop_words[0] has the byte 0xc3 at position 0"),
    ],
)
def test_invalid_utf8_is_refused(server: Any, body: bytes, message: str) -> None:
    assert message in refusal(server, body)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_token", "max_tokens"), ("temprature", "temperature"), ("stop", "stop_words"), ("prompt", "text_input")],
)
def test_an_unknown_field_is_refused_with_the_nearest_valid_name(server: Any, name: str, nearest: str) -> None:
    hint = f"unknown field '{name}' (did you mean {nearest}?); the fields are text_input, max_tokens, "
    assert hint in refusal(server, {**PROMPT, name: 3})
    assert hint in refusal(server, {**PROMPT, "parameters": {name: 3}})


def test_the_keys_that_triton_reserves_are_no_unknown_fields(server: Any) -> None:
    reserved = {"id": "tale-1", "timeout": 60_000_000, "priority": 1, "binary_data_output": True, "triton_x": 1}
    assert generate(server, {**PROMPT, **reserved}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"text_input": "a", "max_tokens": "3"}',
        b'{"text_input": "a", "max_tokens": 3.0}',
        b'{"text_input": "a", "max_tokens": null}',
        b'{"text_input": "a", "temperature": "hot"}',
        b'{"text_input": "a", "stream": 0}',
        b'{"text_input": "a", "seed": -1}',
        b'{"text_input": 5}',
        b'{"text_input": {"a": "b"}}',
        b'{"text_input": "\\ud800"}',
        b'{"text_input": ',
        b"[]",
        b"",
    ],
)
def test_json_of_the_wrong_type_is_answered_500_by_tritons_own_parser(server: Any, body: bytes) -> None:
    response = generate(server, body)
    assert response.status_code == 500
    assert response.json()["error"]


def test_a_json_number_of_more_than_32_bits_is_cut_by_tritons_own_parser(server: Any) -> None:
    assert "max_tokens is 0;" in refusal(server, {**PROMPT, "max_tokens": 2**32})


def test_fields_with_unequal_numbers_of_rows_are_refused_by_triton(server: Any) -> None:
    message = refusal(server, {"text_input": ["Once", "The wolf"], "max_tokens": 3})
    assert "batch size does not match" in message


def test_more_rows_than_a_request_may_have_are_refused_by_triton(server: Any) -> None:
    assert "batch-size must be <= 128" in refusal(server, {"text_input": ["a"] * 129})


def test_an_error_names_the_row_of_a_batch(server: Any) -> None:
    body = {"text_input": ["Once", "The wolf", "A king"], "max_tokens": [3, 4, 100_000]}
    assert ", row 2: max_tokens is 100000; it must be from 1 to" in refusal(server, body)
    body = {"text_input": ["Once", "", "A king"], "max_tokens": [3, 4, 5]}
    assert ", row 1: text_input is empty;" in refusal(server, body)
    body = {"text_input": ["Once", "The wolf"], "num_return_sequences": [1, 2]}
    assert ", row 1: num_return_sequences is 2; it must be 1, as in row 0" in refusal(server, body)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_input": np.array([["a"]], object), "max_token": np.array([[3]], np.int32)}, "input 'max_token'"),
        ({"text_input": np.array([["a"]], object), "max_tokens": np.array([[3]], np.int64)}, "expects 'INT32'"),
        ({"text_input": np.array([["a"]], object), "max_tokens": np.array([[3, 4]], np.int32)}, r"Expected \[-1,1\]"),
        ({"text_input": np.array(["a"], object)}, r"Expected \[-1,1\]"),
        ({"text_input": np.array([["a"]], object), "top_p": np.array([[np.nan]], np.float32)}, "top_p is nan; it must"),
        ({"text_input": np.array([[b"a\xff"]], object)}, "0xff at position 1; it must be valid UTF-8"),
        ({"text_input": np.array([["a"], [""]], object)}, "row 1: text_input is empty"),
        ({"max_tokens": np.array([[3]], np.int32)}, "text_input is missing"),
    ],
)
@pytest.mark.parametrize("protocol", [tritonclient.http, tritonclient.grpc], ids=lambda module: module.__name__)
def test_bad_tensors_are_refused_over_infer(server: Any, protocol: Any, tensors: dict[str, Any], message: str) -> None:
    url = server.http_url if protocol is tritonclient.http else server.grpc_url
    with protocol.InferenceServerClient(url.split("//")[-1]) as client:
        inputs = []
        for name, array in tensors.items():
            datatype = {"object": "BYTES", "int32": "INT32", "int64": "INT64", "float32": "FP32"}[array.dtype.name]
            inputs.append(protocol.InferInput(name, list(array.shape), datatype))
            inputs[-1].set_data_from_numpy(array)
        with pytest.raises(InferenceServerException, match=message) as error:
            client.infer("ensemble", inputs)
        assert error.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


@pytest.mark.parametrize("protocol", [tritonclient.http, tritonclient.grpc], ids=lambda module: module.__name__)
def test_a_field_sent_as_a_request_parameter_is_refused_and_not_dropped(server: Any, protocol: Any) -> None:
    url = server.http_url if protocol is tritonclient.http else server.grpc_url
    with protocol.InferenceServerClient(url.split("//")[-1]) as client:
        text = protocol.InferInput("text_input", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([["a"]], object))
        with pytest.raises(InferenceServerException, match="max_tokens came as a request parameter"):
            client.infer("ensemble", [text], parameters={"max_tokens": 3})


def test_good_requests_among_bad_ones_are_all_answered(server: Any) -> None:
    bad = [{"text_input": ""}, {**PROMPT, "top_p": 2}, {"text_input": "a" * 1_000_000}, {**PROMPT, "max_token": 1}]
    bodies = [body for each in bad for body in (each, PROMPT)] * 8
    with ThreadPoolExecutor(16) as pool:
        statuses = [response.status_code for response in pool.map(lambda body: generate(server, body), bodies)]
    assert statuses == [400, 200] * (len(bodies) // 2)
