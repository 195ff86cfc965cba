"""`serve.py --streaming-ensemble`: clients that know one model, `ensemble`, get whole answers and streams of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from gptj_triton.bench.holding.readings import read_metrics
from tests.server.conftest import FREE_WITHIN, Server, is_idle, start, wait_until
from tests.server.test_outputs import OUTPUTS, Arrays, fields, stream, subsets
from tests.server.test_streaming import LONG, GrpcStream, frames, post

WHOLE: list[dict[str, Any]] = [{}, {"stream": False}]


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    launched = start(tmp_path_factory.mktemp("streaming"), "--streaming-ensemble", "--", "--exit-timeout-secs=5")
    try:
        yield launched.wait_until_ready()
    finally:
        launched.close()


@pytest.fixture
def grpc(streaming: Server) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(streaming.grpc_url) as client:
        yield client


def ask(server: Server, path: str, **given: Any) -> list[dict[str, Any]]:
    """What came over HTTP: one answer, or the events of a stream."""
    with post(server, f"ensemble/{path}", max_tokens=20, **given) as response:
        assert response.status_code == 200, response.text
        return list(frames(response)) if path == "generate_stream" else [response.json()]


def without_stream(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if name != "stream"}


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
@pytest.mark.parametrize("given", WHOLE, ids=str)
def test_an_answer_is_whole_unless_a_stream_is_asked_for(
    streaming: Server, server: Server, path: str, given: dict[str, bool]
) -> None:
    for more in ({}, {"beam_width": 3}, {"num_return_sequences": 2, "seed": 1}, {"stop_words": ["king"]}):
        assert ask(streaming, path, **given, **more) == ask(server, "generate", **more)


def test_a_stream_comes_in_pieces(streaming: Server, server: Server) -> None:
    [whole] = ask(server, "generate")
    pieces = ask(streaming, "generate_stream", stream=True)
    assert len(pieces) > 2
    assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"]
    assert [piece["finish_reason"] for piece in pieces] == [""] * (len(pieces) - 1) + [whole["finish_reason"]]
    assert pieces[-1]["sequence_length"] == whole["sequence_length"]
    assert {piece["model_name"] for piece in pieces} == {"ensemble"}


def test_streams_over_grpc_are_whole_or_in_pieces(grpc: Any) -> None:
    asked = fields("Once upon a time", "The wolf", max_tokens=20)
    [absent] = stream(grpc, "ensemble", asked)
    [false] = stream(grpc, "ensemble", asked | {"stream": np.full((2, 1), False)})
    pieces = stream(grpc, "ensemble", asked | {"stream": np.full((2, 1), True)})
    assert len(pieces) > 2
    joined = [b"".join(texts) for texts in zip(*[piece["text_output"] for piece in pieces], strict=True)]
    assert joined == absent["text_output"].tolist() == false["text_output"].tolist()


def test_any_subset_of_the_outputs_is_had_whole_and_streamed(grpc: Any) -> None:
    asked = fields("Once upon a time")
    for subset in subsets(OUTPUTS):
        for streamed in (False, True):
            pieces = stream(grpc, "ensemble", asked | {"stream": np.full((1, 1), streamed)}, subset)
            assert all(set(piece) == set(subset) for piece in pieces)


def test_the_other_models_are_as_ever(streaming: Server) -> None:
    with post(streaming, "ensemble_stream/generate_stream", max_tokens=20) as response:
        assert len(list(frames(response))) > 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 3}, "top_p is 3; it must be"),
        ({"stream": True, "beam_width": 3}, "beam_width is 3, allowed: 1 in a stream"),
        ({"beem_width": 3}, "did you mean beam_width?"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(streaming: Server, given: dict[str, Any], message: str) -> None:
    with post(streaming, "ensemble/generate_stream", **given) as response:
        [frame] = frames(response)
    assert message in frame["error"]


def cancelled(server: Server) -> float:
    """How many requests have ended because their clients left."""
    return sum(
        value
        for (name, labels), value in read_metrics(server.metrics_url).items()
        if name == "gptj_request_success_total" and 'finished_reason="cancelled"' in labels
    )


def test_a_client_that_leaves_a_stream_frees_the_pages(streaming: Server) -> None:
    before = cancelled(streaming)
    response = post(streaming, "ensemble/generate_stream", stream=True, **LONG)
    next(frames(response))
    response.close()
    wait_until(lambda: cancelled(streaming) == before + 1, "cancelled request", FREE_WITHIN)
    wait_until(lambda: is_idle(streaming), "idle engine", FREE_WITHIN)


def test_a_grpc_stream_that_is_cancelled_frees_the_pages(streaming: Server, grpc: Any) -> None:
    asked = without_stream(fields("Once", max_tokens=900, min_tokens=np.int32(900)))
    before = cancelled(streaming)
    GrpcStream(grpc, "ensemble", asked | {"stream": np.full((1, 1), True)}).next()
    grpc.stop_stream(cancel_requests=True)
    wait_until(lambda: cancelled(streaming) == before + 1, "cancelled request", FREE_WITHIN)
    wait_until(lambda: is_idle(streaming), "idle engine", FREE_WITHIN)
