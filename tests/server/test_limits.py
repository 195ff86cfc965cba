"""A request beyond a limit is refused by the limit's name, at every model and over every protocol, and costs little."""

from __future__ import annotations

import json
import queue
import time
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from gptj_triton.limits import DEFAULTS

Request = dict[str, NDArray[Any]]

SOON = 5.0  # seconds for a refusal, on a machine that is busy with something else
PROTOCOLS = pytest.mark.parametrize(
    "protocol", [tritonclient.http, tritonclient.grpc], ids=lambda module: module.__name__.removeprefix("tritonclient.")
)


def column(value: int, rows: int = 1, dtype: Any = np.uint32) -> NDArray[Any]:
    return np.full((rows, 1), value, dtype)


def strings(count: int, rows: int = 1, word: bytes = b"x") -> NDArray[Any]:
    return np.full((rows, count), word, np.object_)


def text(rows: int = 1, word: bytes = b"Once", **more: Any) -> Request:
    """What a user sends."""
    return {"text_input": strings(1, rows, word), **more}


def ids(rows: int = 1, new: int = 1, **more: NDArray[Any]) -> Request:
    """The same as tokens."""
    required = {"input_lengths": column(4, rows), "request_output_len": column(new, rows)}
    return {"input_ids": np.ones((rows, 4), np.uint32), **required, **more}


def answer(rows: int = 1, sequences: int = 1, width: int = 4, **more: NDArray[Any]) -> Request:
    """What postprocessing is sent."""
    lengths = {"sequence_length": np.full((rows, sequences), width, np.uint32), "input_lengths": column(1, rows)}
    return {"output_ids": np.ones((rows, sequences, width), np.uint32), "end_id": column(0, rows), **lengths, **more}


def words(count: int) -> NDArray[np.int32]:
    """Words of one token each."""
    return np.stack([np.ones(count, np.int32), np.arange(1, count + 1, dtype=np.int32)])[np.newaxis]


def copies(number: int, rows: int) -> NDArray[Any]:
    return column(number, rows, np.int32)


FLOOD: Request = {"max_tokens": column(900, 128, np.int32), "num_return_sequences": copies(64, 128)}
FRONTEND_CASES: list[tuple[str, Request]] = [
    ("max_request_sequences", ids(128, 900, num_return_sequences=copies(64, 128))),
    ("max_request_sequences", ids(128, 900, beam_width=column(64, 128))),
    ("max_request_tokens", ids(128, 900, num_return_sequences=copies(8, 128))),
    ("max_request_strings", ids(stop_strings=strings(100_000))),
    ("max_request_strings", ids(stop_strings=strings(1_000_000, word=b""))),
    ("max_request_word_bytes", ids(bad_words_list=words(1_000_000))),
    ("max_request_word_bytes", ids(stop_words_list=words(1_000_000))),
    ("max_request_word_bytes", ids(64, stop_strings=strings(200, 64, b"x" * 100))),
    ("max_words", ids(bad_words_list=words(2 * DEFAULTS.max_words + 1))),
    ("max_words", ids(end_ids=np.ones((1, 100_000), np.int32))),
    ("max_words", ids(stop_strings=strings(DEFAULTS.max_words + 1))),
    ("max_word_bytes", ids(stop_strings=strings(2, word=b"x" * 40_000))),
    ("max_request_bytes", ids(stop_strings=strings(1, word=b"x" * 20_000_000))),
    ("max_request_bytes", ids() | {"input_ids": np.ones((1, 5_000_000), np.uint32)}),
]
TEXT_CASES: list[tuple[str, Request]] = [
    ("max_request_sequences", text(128) | FLOOD),
    ("max_request_tokens", text(128) | FLOOD | {"num_return_sequences": copies(8, 128)}),
    ("max_request_text_bytes", text(word=b"x" * 8_000_000)),
    ("max_request_bytes", text(word=b"x" * 30_000_000)),
    ("max_request_strings", text(stop_words=strings(100_000))),
    ("max_request_word_bytes", text(64, bad_words=strings(200, 64, b"x" * 100))),
    ("max_words", text(bad_words=strings(DEFAULTS.max_words + 1))),
    ("max_word_bytes", text(stop_words=strings(2, word=b"x" * 40_000))),
]
CASES = [
    *(("fastertransformer", *case) for case in FRONTEND_CASES),
    *(("preprocessing", *case) for case in TEXT_CASES),
    ("preprocessing", "max_request_rows", text(100_000)),
    ("ensemble", *TEXT_CASES[0]),
    ("ensemble", *TEXT_CASES[3]),
    ("postprocessing", "max_request_sequences", answer(sequences=100_000, width=1)),
    ("postprocessing", "max_request_tokens", answer(width=1_000_000)),
    ("postprocessing", "max_request_bytes", answer(width=8_000_000)),
    ("postprocessing", "max_request_strings", answer(stop_words=strings(100_000))),
    ("postprocessing", "max_request_word_bytes", answer(64, stop_words=strings(200, 64, b"x" * 100))),
    ("postprocessing", "max_words", answer(end_ids=np.ones((1, 100_000), np.int32))),
    ("postprocessing", "max_word_bytes", answer(stop_words=strings(2, word=b"x" * 40_000))),
]


def inputs(protocol: Any, request: Request) -> list[Any]:
    made = []
    for name, array in request.items():
        made.append(protocol.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        made[-1].set_data_from_numpy(array)
    return made


def beyond(limit: str) -> str:
    return rf"allowed: 0 to \d+ \(limit {limit}\)$"


@PROTOCOLS
@pytest.mark.parametrize(
    ("model", "limit", "request_"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_request_beyond_a_limit_is_refused_by_its_name(
    server: Any, protocol: Any, model: str, limit: str, request_: Request
) -> None:
    url = server.http_url if protocol is tritonclient.http else server.grpc_url
    with protocol.InferenceServerClient(url) as client:
        began = time.monotonic()
        with pytest.raises(InferenceServerException, match=beyond(limit)) as error:
            client.infer(model, inputs(protocol, request_))
        assert time.monotonic() - began < SOON
    assert error.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("limit", "request_"), FRONTEND_CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_streaming_model_keeps_the_limits_of_the_other(server: Any, limit: str, request_: Request) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error))
        client.async_stream_infer("fastertransformer_stream", inputs(tritonclient.grpc, request_))
        error = answers.get(timeout=SOON)
        client.stop_stream()
    assert error is not None
    with pytest.raises(InferenceServerException, match=beyond(limit)):
        raise error


@pytest.mark.parametrize("model", ["ensemble", "ensemble_stream", "preprocessing", "fastertransformer"])
@pytest.mark.parametrize(
    ("limit", "parameters"),
    [
        ("max_parameters", {f"key{number}": 1 for number in range(1000)}),
        ("max_parameter_bytes", {"key": "x" * 100_000}),
    ],
)
def test_many_or_large_unknown_keys_are_refused(
    server: Any, model: str, limit: str, parameters: dict[str, Any]
) -> None:
    request = text() if "fastertransformer" not in model else ids()
    tensors = {name: array.ravel().tolist() for name, array in request.items()}
    fields = {name: each[0] if len(each) == 1 else each for name, each in tensors.items()}
    fields |= {name: value[0].decode() for name, value in tensors.items() if isinstance(value[0], bytes)}
    ending = "generate_stream" if model == "ensemble_stream" else "generate"
    url = f"http://{server.http_url}/v2/models/{model}/{ending}"
    response = requests.post(url, json=fields | parameters, timeout=60)
    assert response.status_code == 400
    message = json.loads(response.text.removeprefix("data:"))["error"]
    assert message.endswith(f"(limit {limit})"), message


def test_what_is_at_the_limits_is_answered(server: Any) -> None:
    at = text(
        128,
        max_tokens=column(1, 128, np.int32),
        num_return_sequences=copies(8, 128),
        stop_words=strings(100, 128, b"zq"),
    )
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        result = client.infer("ensemble", inputs(tritonclient.grpc, at))
    assert result.as_numpy("text_output").shape == (128, 8)


def test_serve_sets_a_limit_in_every_model(launch: Any) -> None:
    server = launch("--limit", "max_words=2", "--limit=max_new_tokens=3").wait_until_ready()
    cases = [
        ("ensemble", "max_words", text(stop_words=strings(3))),
        ("fastertransformer", "max_words", ids(stop_strings=strings(3))),
        ("postprocessing", "max_words", answer(stop_words=strings(3))),
        ("ensemble", "max_new_tokens", text(max_tokens=column(4, dtype=np.int32))),
        ("fastertransformer", "max_new_tokens", ids(new=4)),
    ]
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        for model, limit, request in cases:
            with pytest.raises(InferenceServerException, match=beyond(limit)):
                client.infer(model, inputs(tritonclient.grpc, request))
        result = client.infer("ensemble", inputs(tritonclient.grpc, text()))
    assert result.as_numpy("sequence_length").item() == 1 + 3
