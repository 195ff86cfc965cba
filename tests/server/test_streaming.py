"""Streams through a real server: what the pieces hold, who shares the engine, and what becomes of a stream when its
client, a model, the engine or the server goes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from gptj_triton.triton.stubs import STUB
from tests.server.conftest import (
    CLOSE,
    FREE_WITHIN,
    READY_SECONDS,
    SOON_SECONDS,
    Server,
    is_idle,
    wait_for_sequences,
    wait_until,
)

PROMPT = "Once upon a time"
LONG = {"text_input": PROMPT, "max_tokens": 900, "min_tokens": 900}
TYPES = {"uint32": "UINT32", "uint64": "UINT64", "int32": "INT32", "float32": "FP32", "bool": "BOOL", "object": "BYTES"}

Arrays = dict[str, NDArray[Any]]


def post(server: Server, path: str, **fields: Any) -> requests.Response:
    url = f"http://{server.http_url}/v2/models/{path}"
    return requests.post(url, json={"text_input": PROMPT, **fields}, headers=CLOSE, stream=True, timeout=60)


def frames(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    for line in response.iter_lines():
        if line:
            yield json.loads(line.removeprefix(b"data: "))


def stream(server: Server, **fields: Any) -> list[dict[str, Any]]:
    with post(server, "ensemble_stream/generate_stream", **fields) as response:
        return list(frames(response))


def generate(server: Server, model: str = "ensemble", **fields: Any) -> dict[str, Any]:
    with post(server, f"{model}/generate", **fields) as response:
        assert response.status_code == 200, response.text
        return dict(response.json())


def tokens(*prompts: list[int], new: int, **others: Any) -> Arrays:
    """Tensors for either model of the backend; none of the rows ends early."""
    width = max(map(len, prompts))
    return {
        "input_ids": np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts], np.uint32),
        "input_lengths": np.array([[len(prompt)] for prompt in prompts], np.uint32),
        "request_output_len": np.full((len(prompts), 1), new, np.uint32),
        "min_length": np.full((len(prompts), 1), new, np.uint32),
        **{name: np.array(value)[..., np.newaxis] for name, value in others.items()},
    }


def inputs(arrays: Arrays) -> list[Any]:
    result = []
    for name, array in arrays.items():
        result.append(tritonclient.grpc.InferInput(name, array.shape, TYPES[array.dtype.name]))
        result[-1].set_data_from_numpy(array)
    return result


class GrpcStream:
    """One stream over gRPC: the responses as they come."""

    def __init__(self, client: Any, model: str, arrays: Arrays, **options: Any) -> None:
        self.client = client
        self._responses: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: self._responses.put(error or result))
        client.async_stream_infer(model, inputs(arrays), enable_empty_final_response=True, **options)

    def next(self, seconds: float = SOON_SECONDS) -> Any:
        response = self._responses.get(timeout=seconds)
        if isinstance(response, InferenceServerException):
            raise response
        return response

    def all(self) -> list[Any]:
        """All responses until the one that is marked as the last."""
        responses = [self.next()]
        while not is_marked_last(responses[-1]):
            responses.append(self.next())
        return responses


def read_to_the_end(reader: Iterator[dict[str, Any]]) -> bool:
    """True when it has ended, in order or not."""
    with contextlib.suppress(requests.RequestException):
        list(reader)
    return True


def is_marked_last(response: Any) -> bool:
    return bool(response.get_response().parameters["triton_final_response"].bool_param)


def filled_ids(piece: Any) -> list[list[list[int]]]:
    """The token ids of each sequence of each row so far, without the padding."""
    ids, lengths = piece.as_numpy("output_ids"), piece.as_numpy("sequence_length")
    return [
        [row[n][:length].tolist() for n, length in enumerate(of_row)] for row, of_row in zip(ids, lengths, strict=True)
    ]


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as opened:
        yield opened


def test_the_pieces_of_a_stream_are_the_text_of_one_answer(server: Server) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 60,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "stop_words": ["king,"],
        "seed": 3,
    }
    others: list[dict[str, Any]] = [{"exclude_input_in_output": False}, {"temperature": 0.8, "return_log_probs": True}]
    for more in ({}, *others):
        whole, pieces = generate(server, **fields, **more), stream(server, **fields, **more)
        assert len(pieces) > 1
        assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"]
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [""] * (len(pieces) - 1)
        assert sum(piece["num_output_tokens"] for piece in pieces) == whole["num_output_tokens"]
        for name in set(whole) - {"text_output", "num_output_tokens", "model_name"}:
            assert pieces[-1][name] == whole[name], name


def test_one_answer_is_had_where_stream_is_false(server: Server) -> None:
    others: list[dict[str, Any]] = [{"exclude_input_in_output": False, "stop_words": ["king"]}]
    for more in ({"beam_width": 3}, {"num_return_sequences": 2}, *others):
        fields: dict[str, Any] = {
            "max_tokens": 12,
            "return_num_output_tokens": True,
            "return_log_probs": True,
            "seed": 1,
            **more,
        }
        whole, answer = generate(server, **fields), generate(server, "ensemble_stream", stream=False, **fields)
        assert answer.pop("model_name") == "ensemble_stream"
        assert answer == {name: value for name, value in whole.items() if name != "model_name"}


def test_what_cannot_be_streamed_is_refused_by_name(server: Server) -> None:
    for fields, message in (
        ({"beam_width": 3}, "beam_width is 3, allowed: 1 in a stream: beams are not streamed"),
        ({"top_p": 3}, "top_p is 3; it must be"),
        ({"timeout": -1}, "timeout is -1; it must be a whole number of microseconds"),
    ):
        with post(server, "ensemble_stream/generate_stream", **fields) as response:
            assert response.status_code == 400
            [frame] = frames(response)
            assert message in frame["error"]


def test_every_response_has_all_tokens_so_far_and_the_last_one_is_marked(client: Any) -> None:
    asked = tokens([5, 6, 7], new=60, is_return_log_probs=[True])
    whole = client.infer("fastertransformer", inputs(asked))
    pieces = GrpcStream(client, "fastertransformer_stream", asked).all()
    client.stop_stream()
    ids = filled_ids(whole)
    lengths = [int(piece.as_numpy("sequence_length").item()) for piece in pieces]
    assert [int(piece.as_numpy("previous_length").item()) for piece in pieces] == [3, *lengths[:-1]]
    assert lengths == sorted(set(lengths)) and lengths[-1] == 63 and len(lengths) > 2
    for piece, length in zip(pieces, lengths, strict=True):
        assert filled_ids(piece) == [[ids[0][0][:length]]]
        log_probs = whole.as_numpy("output_log_probs")[:, :, : length - 3]
        np.testing.assert_array_equal(piece.as_numpy("output_log_probs"), log_probs)
        np.testing.assert_allclose(piece.as_numpy("cum_log_probs"), log_probs.sum(axis=2), rtol=1e-5)
        assert piece.as_numpy("input_lengths").tolist() == [[3]]
        assert piece.as_numpy("stop_strings") is None
    assert [piece.as_numpy("finish_reason").item() for piece in pieces] == [b""] * (len(pieces) - 1) + [b"length"]


def test_rows_and_returned_sequences_stream_side_by_side(client: Any) -> None:
    asked = tokens([5, 6, 7], [8], new=20, num_return_sequences=[np.int32(2)] * 2, runtime_top_p=[np.float32(1)] * 2)
    asked["request_output_len"][1] = asked["min_length"][1] = 5
    whole = client.infer("fastertransformer", inputs(asked))
    pieces = GrpcStream(client, "fastertransformer_stream", asked).all()
    client.stop_stream()
    assert filled_ids(pieces[-1]) == filled_ids(whole)
    assert pieces[-1].as_numpy("finish_reason").tolist() == [[b"length"] * 2] * 2
    expected = np.array([[3, 3], [1, 1]])
    for piece in pieces:
        np.testing.assert_array_equal(piece.as_numpy("previous_length"), expected)
        expected = piece.as_numpy("sequence_length")
        assert is_marked_last(piece) or set(piece.as_numpy("finish_reason").ravel()) == {b""}


def test_both_doors_are_busy_at_once_and_share_one_engine(server: Server) -> None:
    [engine] = server.engines
    fields: dict[str, Any] = {"max_tokens": 200, "min_tokens": 200}  # so long that all have come before one has gone
    alone = generate(server, **fields)["text_output"]
    with ThreadPoolExecutor(12) as pool:
        whole = [pool.submit(generate, server, **fields) for _ in range(6)]
        streamed = [pool.submit(stream, server, **fields) for _ in range(6)]
        wait_for_sequences(server, 12)
        texts = [future.result()["text_output"] for future in whole]
        texts += ["".join(piece["text_output"] for piece in future.result()) for future in streamed]
    assert texts == [alone] * 12
    assert server.engines == [engine]


def test_tokens_that_wait_travel_together_under_a_cap_of_pieces(server: Server) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        streams = list(pool.map(lambda _: stream(server, max_tokens=60, min_tokens=60), range(32)))
    pieces = sum(map(len, streams))
    assert pieces <= 1000 * (time.monotonic() - started) + 2 * 32  # the first and the last of a stream do not wait
    assert {each[-1]["sequence_length"] for each in streams} == {64}


@pytest.mark.parametrize("count", [1, 8])
def test_a_client_that_closes_its_connection_frees_the_pages(server: Server, count: int) -> None:
    left = [post(server, "ensemble_stream/generate_stream", **LONG) for _ in range(count)]
    readers = [frames(response) for response in left]
    for reader in readers:
        next(reader)
    wait_for_sequences(server, count)
    for response in left:
        response.close()
    wait_until(lambda: is_idle(server), "idle engine", FREE_WITHIN)


@pytest.mark.parametrize("model", ["ensemble_stream", "fastertransformer_stream"])
def test_a_grpc_stream_that_is_cancelled_frees_the_pages(server: Server, client: Any, model: str) -> None:
    if model == "ensemble_stream":
        asked = {
            name: np.array([[value]], object if name == "text_input" else np.int32) for name, value in LONG.items()
        }
    else:
        asked = tokens([5, 6, 7], new=900)
    GrpcStream(client, model, asked).next()
    wait_for_sequences(server, 1)
    time.sleep(0.5)  # younger requests of a model are not asked about
    client.stop_stream(cancel_requests=True)
    wait_until(lambda: is_idle(server), "idle engine", FREE_WITHIN)


def test_a_grpc_request_for_one_answer_that_is_cancelled_frees_the_pages(server: Server, client: Any) -> None:
    call = client.async_infer("fastertransformer", inputs(tokens([5, 6, 7], new=900)), lambda result, error: None)
    wait_for_sequences(server, 1)
    time.sleep(0.5)
    call.cancel()
    wait_until(lambda: is_idle(server), "idle engine", FREE_WITHIN)


@pytest.mark.parametrize("path", ["ensemble/generate", "ensemble_stream/generate_stream"])
def test_a_timeout_ends_a_request_with_what_there_is(server: Server, path: str) -> None:
    started = time.monotonic()
    with post(server, path, **LONG, timeout=300_000) as response:
        answers = list(frames(response))
    assert time.monotonic() - started >= 0.3
    assert answers[-1]["sequence_length"] < 900
    assert answers[-1]["finish_reason"] == "timeout"
    assert "".join(answer["text_output"] for answer in answers).startswith(" there was")
    wait_until(lambda: is_idle(server), "idle engine", FREE_WITHIN)


def test_a_timeout_is_tritons_own_over_grpc(server: Server, client: Any) -> None:
    answer = client.infer("fastertransformer", inputs(tokens([5], [6], new=900)), timeout=200_000)
    assert set(answer.as_numpy("finish_reason").ravel()) == {b"timeout"}
    pieces = GrpcStream(client, "fastertransformer_stream", tokens([5], new=900), timeout=200_000).all()
    client.stop_stream()
    assert pieces[-1].as_numpy("finish_reason").item() == b"timeout"


def test_either_door_starts_the_engine_and_serves_without_the_other(launch: Callable[..., Server]) -> None:
    ensembles = {"fastertransformer": "ensemble", "fastertransformer_stream": "ensemble_stream"}
    server = launch().wait_until_ready()

    def index(action: str, model: str) -> None:
        url = f"http://{server.http_url}/v2/repository/models/{model}/{action}"
        assert requests.post(url, headers=CLOSE, timeout=60).ok

    def unload(door: str) -> None:
        index("unload", ensembles[door])
        index("unload", door)

    def serves(door: str) -> bool:
        answer = generate(server, ensembles[door], stream=False, max_tokens=8)
        return bool(answer["text_output"] == " there was a king who had a daughter")

    for first, second in (list(ensembles), reversed(ensembles)):
        unload(first)
        unload(second)
        wait_until(lambda: not server.engines, "end of the engine")
        index("load", ensembles[first])
        assert serves(first)
        [engine] = server.engines
        index("load", ensembles[second])
        assert serves(second)
        unload(first)
        wait_until(lambda: len(server.processes_with(STUB)) == 3, "unloaded model")
        assert serves(second)
        assert server.engines == [engine]


def test_streams_end_once_when_the_engine_is_killed_and_when_the_server_stops(launch: Callable[..., Server]) -> None:
    server = launch("--drain-timeout=1").wait_until_ready()
    [engine] = server.engines
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        doomed = GrpcStream(client, "fastertransformer_stream", tokens([5], [6, 7], new=900))
        opened = [post(server, "ensemble_stream/generate_stream", **LONG) for _ in range(8)]
        readers = [frames(response) for response in opened]
        for reader in readers:
            next(reader)
        os.kill(engine.pid, signal.SIGKILL)
        killed = time.monotonic()
        for reader in readers:
            *_, last = reader
            assert "the engine process ended unexpectedly" in last["error"]
        with pytest.raises(InferenceServerException, match="the engine process ended unexpectedly"):
            doomed.all()
        assert time.monotonic() - killed < SOON_SECONDS
        with pytest.raises(queue.Empty):
            doomed.next(seconds=0.2)

    def serves() -> bool:
        return "error" not in stream(server, max_tokens=4)[-1]

    wait_until(serves, "new engine", READY_SECONDS)
    wait_until(lambda: is_idle(server), "idle engine")
    reader = frames(post(server, "ensemble_stream/generate_stream", **LONG))
    next(reader)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(read_to_the_end, reader)
        assert server.stop() == 3
        assert rest.result(SOON_SECONDS)
