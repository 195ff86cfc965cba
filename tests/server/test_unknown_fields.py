"""A name that is no field: near a field it is refused, whatever else is given; other parameters are let through."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.server.conftest import CLOSE, SOON_SECONDS

MODULES = [tritonclient.http, tritonclient.grpc]
DOORS = [
    "ensemble/generate",
    "ensemble/generate_stream",
    "ensemble_stream/generate",
    "ensemble_stream/generate_stream",
    "preprocessing/generate",
]
FOREIGN = {"team": "a", "x-request-id": "7f3a", "traceparent": "00-0af7651916cd43dd", "cost_centre": 12, "dry": False}


def post(server: Any, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(f"http://{server.http_url}/v2/models/{path}", json=body, headers=CLOSE, timeout=60)


def refusal(server: Any, path: str, body: dict[str, Any]) -> str:
    response = post(server, path, body)
    assert response.status_code == 400, response.text
    return str(response.text)


def text_input(protocol: Any) -> Any:
    text = protocol.InferInput("text_input", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([["Once"]], object))
    return text


def infer(server: Any, protocol: Any, inputs: list[Any], parameters: dict[str, Any]) -> Any:
    url = server.http_url if protocol is tritonclient.http else server.grpc_url
    with protocol.InferenceServerClient(url) as client:
        return client.infer("ensemble", inputs, parameters=parameters)


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("name", ["prompt", "inputs", "Input", "textInput", "text-input", "input_text"])
def test_a_prompt_by_another_name_is_refused_with_both_names(server: Any, path: str, name: str) -> None:
    hint = f"unknown field '{name}' (did you mean text_input?); the fields are text_input, max_tokens, "
    assert hint in refusal(server, path, {name: "Once"})
    assert hint in refusal(server, path, {name: "Once", "max_tokens": 3})
    assert hint in refusal(server, path, {name: "Once", "parameters": {"max_new_tokens": 20}})


@pytest.mark.parametrize("path", DOORS)
def test_without_a_prompt_every_unknown_name_is_told(server: Any, path: str) -> None:
    message = "text_input is missing; it must be a prompt of at least one character"
    assert f"{message} (unknown field 'question')" in refusal(server, path, {"question": "Who?"})
    assert f"{message} (unknown fields 'question', 'team')" in refusal(server, path, {"question": "Who?", "team": "a"})
    assert f'{message}"' in refusal(server, path, {})
    assert f'{message}"' in refusal(server, path, {"id": "tale-1", "timeout": 60_000_000})


@pytest.mark.parametrize("protocol", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("name", "words"),
    [("prompt", "unknown field 'prompt' (did you mean text_input?)"), ("question", "text_input is missing; ")],
)
def test_infer_without_a_tensor_names_the_parameter_and_text_input(
    server: Any, protocol: Any, name: str, words: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(server, protocol, [], {name: "Once"})
    assert words in str(caught.value)
    assert repr(name) in str(caught.value)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


@pytest.mark.parametrize("model", ["ensemble", "ensemble_stream"])
def test_a_grpc_stream_without_a_tensor_names_the_parameter_and_text_input(server: Any, model: str) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        client.async_stream_infer(model, [], parameters={"prompt": "Once"})
        error = answers.get(timeout=SOON_SECONDS)
        client.stop_stream()
    assert isinstance(error, InferenceServerException)
    assert "unknown field 'prompt' (did you mean text_input?)" in str(error)


@pytest.mark.parametrize("protocol", MODULES, ids=lambda module: module.__name__)
def test_infer_lets_parameters_through_that_are_like_no_field(server: Any, protocol: Any) -> None:
    plain = infer(server, protocol, [text_input(protocol)], {}).as_numpy("text_output").tolist()
    assert infer(server, protocol, [text_input(protocol)], FOREIGN).as_numpy("text_output").tolist() == plain


def test_json_lets_parameters_through_that_are_like_no_field(server: Any) -> None:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["Once"]}
    assert post(server, "ensemble/infer", {"inputs": [tensor], "parameters": FOREIGN}).status_code == 200
    for path in ("ensemble/generate", "ensemble_stream/generate_stream"):
        fields = {"text_input": "Once", "max_tokens": 1}  # a stream of one piece
        plain = post(server, path, fields)
        assert post(server, path, {**fields, **FOREIGN}).text == plain.text
        assert post(server, path, {**fields, "parameters": FOREIGN}).text == plain.text


@pytest.mark.parametrize("protocol", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("name", "nearest"), [("max_token", "max_tokens"), ("Top-P", "top_p"), ("stop", "stop_words"), ("n", "num_return")]
)
def test_infer_refuses_parameters_that_are_like_a_field(server: Any, protocol: Any, name: str, nearest: str) -> None:
    with pytest.raises(InferenceServerException, match=f"unknown field '{name}' .did you mean {nearest}"):
        infer(server, protocol, [text_input(protocol)], {name: 3})


@pytest.mark.parametrize("protocol", MODULES, ids=lambda module: module.__name__)
def test_preprocessing_asked_directly_refuses_rows_that_do_not_fit(server: Any, protocol: Any) -> None:
    url = server.http_url if protocol is tritonclient.http else server.grpc_url
    text = protocol.InferInput("text_input", [2, 1], "BYTES")
    text.set_data_from_numpy(np.array([["Once"], ["Twice"]], object))
    most = protocol.InferInput("max_tokens", [1, 1], "INT32")
    most.set_data_from_numpy(np.array([[3]], np.int32))
    with protocol.InferenceServerClient(url) as client:
        with pytest.raises(InferenceServerException, match="max_tokens has 1 rows; it must have 2, as text_input has"):
            client.infer("preprocessing", [text, most])
        assert client.infer("preprocessing", [text]).as_numpy("input_ids").shape[0] == 2
