"""What an operator reads: a request's id in every line about it, no text of requests, and JSON where it is asked for.
And what a client reads: no path, and no word of an exception."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.server.conftest import CLOSE, PROJECT, wait_for_sequences

SECRET = "the name of the dragon"


def post(server: Any, **fields: Any) -> requests.Response:
    body = {"text_input": SECRET, "max_tokens": 2} | fields
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    return requests.post(url, json=body, headers=CLOSE, timeout=60)


def infer(server: Any, model: str, request_id: str = "", **tensors: Any) -> str:
    """The error that a request over gRPC gets."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        inputs = []
        for name, array in tensors.items():
            inputs.append(tritonclient.grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        with pytest.raises(InferenceServerException) as error:
            client.infer(model, inputs, request_id=request_id)
    return str(error.value)


def test_every_line_of_json_is_an_object_with_the_requests_id_and_without_its_text(launch: Any) -> None:
    server = launch("--log-format", "json").wait_until_ready()
    assert post(server, id="bad-1", top_p=2).status_code == 400
    long = {"max_tokens": 900, "min_tokens": 900}
    with ThreadPoolExecutor(3) as pool:
        given = pool.submit(post, server, id="lost-1", **long)
        strange = pool.submit(post, server, id=f"x] {'y' * 100}\nz", **long)
        nameless = pool.submit(post, server, **long)
        wait_for_sequences(server, 3)
        [engine] = server.engines
        engine.kill()
        for answer in (given, strange, nameless):
            message = answer.result().json()["error"]
            assert "UNAVAILABLE: the engine process ended unexpectedly" in message
            assert "/" not in message
    assert server.stop() == 0

    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all({"time", "level", "source", "message"} <= set(line) for line in lines)
    assert all(datetime.fromisoformat(line["time"].replace("Z", "+00:00")).tzinfo for line in lines)
    assert {line["level"] for line in lines} <= {"info", "warning", "error"}
    assert {line["source"] for line in lines} >= {"serve.py", "tritonserver", "engine", "fastertransformer"}
    lost = {line["request_id"]: line for line in lines if "not served" in line["message"]}
    assert len(lost) == 3
    assert (lost["lost-1"]["level"], lost["lost-1"]["source"]) == ("warning", "fastertransformer")
    assert r"x\x5d " + "y" * 61 in lost
    assert any(len(name) == 16 and int(name, 16) for name in lost if set(name) <= set("0123456789abcdef"))
    assert SECRET not in server.log.read_text()
    assert not any(line.get("request_id") == "bad-1" for line in lines)
    assert json.loads(server.stdout)["message"] == f"READY http://{server.http_url}"


def test_a_fault_of_the_server_is_told_to_the_log_alone_by_the_requests_id(launch: Any, tmp_path: Path) -> None:
    """The faults are those of two configurations that let through what the code does not expect."""
    repository = tmp_path / "repository"
    shutil.copytree(PROJECT / "model_repository", repository, symlinks=True)
    for model, name in (("preprocessing", "max_tokens"), ("postprocessing", "input_lengths")):
        config = repository / model / "config.pbtxt"
        lines = config.read_text().splitlines()
        [place] = [number for number, line in enumerate(lines) if f'name: "{name}"' in line]
        lines[place] = lines[place].replace("1 ]", "-1 ]")
        config.write_text("\n".join(lines))
    server = launch("--model-repository", repository, "--", "--log-verbose=1").wait_until_ready()
    text = np.array([[SECRET]], object)
    two, one = np.ones((1, 2), np.uint32), np.ones((1, 1), np.uint32)
    messages = [
        infer(server, "preprocessing", "fault-1", text_input=text, max_tokens=two.astype(np.int32)),
        infer(
            server,
            "postprocessing",
            "fault-2",
            output_ids=np.ones((1, 1, 3), np.uint32),
            sequence_length=one,
            input_lengths=two,
            end_id=one,
        ),
    ]
    for number, message in enumerate(messages, 1):
        expected = f"[StatusCode.INTERNAL] a fault of the server; its log has more (request id: fault-{number})"
        assert message == expected
    assert post(server, id="bad-1", top_p=2).status_code == 400
    log = server.log.read_text()
    for number, model in ((1, "preprocessing"), (2, "postprocessing")):
        [line] = [line for line in log.splitlines() if f"[request id: fault-{number}] {model}: failed by" in line]
        assert line.startswith("E")
        assert "ValueError" in line
        assert ".py" in line
    assert "[request id: bad-1] preprocessing: refused: top_p is 2; it must be" in log
