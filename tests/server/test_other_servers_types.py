"""What docs/reference.md says of clients with other integer types, and of headers that Triton forwards, holds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc

from gptj_triton.project import REPOSITORY
from tests.server.conftest import CLOSE, Server, start
from tests.server.test_outputs import Arrays, Asker
from tests.server.test_streaming import GrpcStream

UNSIGNED = ("max_tokens", "top_k", "beam_width")
FORWARD = ["--http-header-forward-pattern=.*", "--grpc-header-forward-pattern=.*"]


def declare(config: Path, name: str, old: str, new: str) -> None:
    """Gives an input another type."""
    declaration = re.compile(rf'(\{{ name: "{name}"  data_type: TYPE_){old}\b')
    text, count = declaration.subn(rf"\g<1>{new}", config.read_text(), count=1)
    assert count == 1
    config.write_text(text)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of this project's models with the types that the reference names; without `ensemble`, which would need
    the seed of `fastertransformer` as it was."""
    folder = tmp_path_factory.mktemp("changed")
    repository = Path(shutil.copytree(REPOSITORY, folder / "repository"))
    shutil.rmtree(repository / "ensemble")
    for model in ("ensemble_stream", "preprocessing"):
        for name in UNSIGNED:
            declare(repository / model / "config.pbtxt", name, "INT32", "UINT32")
    declare(repository / "fastertransformer" / "config.pbtxt", "random_seed", "UINT64", "INT32")
    launched = start(folder, "--model-repository", str(repository), "--", "--exit-timeout-secs=5", *FORWARD)
    try:
        yield launched.wait_until_ready()
    finally:
        launched.close()


@pytest.mark.parametrize("stream", [False, True])
def test_unsigned_fields_are_served_where_they_are_declared(changed: Server, stream: bool) -> None:
    """As LangChain's TritonTensorRTLLM asks: langchain-nvidia-trt 0.0.1rc0, `_generate_inputs`."""
    fields = {
        "text_input": np.array([["Once upon a time"]], object),
        "max_tokens": np.array([[6]], np.uint32),
        "top_k": np.array([[1]], np.uint32),
        "top_p": np.array([[0]], np.float32),
        "temperature": np.array([[1]], np.float32),
        "length_penalty": np.array([[1]], np.float32),
        "repetition_penalty": np.array([[1]], np.float32),
        "random_seed": np.array([[42]], np.uint64),
        "beam_width": np.array([[1]], np.uint32),
        "stream": np.array([[stream]]),
    }
    with tritonclient.grpc.InferenceServerClient(changed.grpc_url) as client:
        pieces = [piece.as_numpy("text_output") for piece in GrpcStream(client, "ensemble_stream", fields).all()]
    text = b"".join(piece.ravel()[0] for piece in pieces if piece is not None)
    assert text == b" there was a king who had"


def test_a_signed_seed_is_served_where_it_is_declared(changed: Server) -> None:
    """As FauxPilot's proxy asks: copilot_proxy/utils/codegen.py, `generate`. A seed may be negative, too."""
    tensors: Arrays = {
        "input_ids": np.array([[2167, 716, 258, 515]], np.uint32),
        "input_lengths": np.array([[4]], np.uint32),
        "request_output_len": np.array([[6]], np.uint32),
        "runtime_top_p": np.array([[1]], np.float32),
    }

    def ids(seed: int) -> list[int]:
        asker = Asker(tritonclient.grpc, changed.grpc_url)
        with asker.client:
            answer = asker.ask("fastertransformer", tensors | {"random_seed": np.array([[seed]], np.int32)})
        return list(answer["output_ids"].ravel().tolist())

    assert ids(7) == ids(7) != ids(2**31 - 1)
    assert ids(-7) == ids(-7)


def test_headers_that_triton_forwards_are_let_through(changed: Server) -> None:
    headers = {**CLOSE, "X-Request-ID": "7f3a", "Traceparent": "00-0af7651916cd43dd", "X-Forwarded-For": "10.0.0.1"}
    url = f"http://{changed.http_url}/v2/models"
    body: dict[str, Any] = {"text_input": "Once", "max_tokens": 3}
    answer = requests.post(f"{url}/ensemble_stream/generate_stream", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["Once"]}
    answer = requests.post(f"{url}/preprocessing/infer", json={"inputs": [tensor]}, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
