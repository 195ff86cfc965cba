"""A signal to stop: requests finish or get one error each, the exit status tells which, and no connection is closed
without an answer."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from tests.server.conftest import CLOSE, READY_SECONDS, Server, wait_for_sequences, wait_until
from tests.server.test_serve import is_ready, make_toy_repository
from tests.server.test_streaming import GrpcStream, tokens

Launch = Callable[..., Server]

STREAMS = 48


def stream(server: Server, tokens: int) -> dict[str, Any]:
    """The last event of a stream."""
    fields = {"text_input": "Once upon a time", "max_tokens": tokens, "min_tokens": tokens}
    url = f"http://{server.http_url}/v2/models/ensemble_stream/generate_stream"
    with requests.post(url, json=fields, headers=CLOSE, stream=True, timeout=120) as response:
        events = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    return dict(json.loads(events[-1]))


def ask_until_refused(server: Server) -> list[str]:
    """One request after the other; the different kinds of answers, in order, until nothing listens any more."""
    kinds: list[str] = []
    while not kinds or "refused" not in kinds[-1]:
        try:
            url = f"http://{server.http_url}/v2/models/ensemble/generate"
            fields = {"text_input": "Once", "max_tokens": 1}
            answer = requests.post(url, json=fields, headers=CLOSE, timeout=60)
            kind = f"{answer.status_code} {answer.text if answer.status_code != 200 else ''}"
        except requests.RequestException as error:
            kind = str(error)
        if kind not in kinds:
            kinds.append(kind)
    return kinds


@pytest.fixture
def idle() -> Callable[[Server], socket.socket]:
    def connect(server: Server) -> socket.socket:
        """A connection that has had its answer."""
        connection = socket.create_connection(("127.0.0.1", server.ports[0]))
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        return connection

    return connect


def test_what_does_not_finish_in_time_gets_one_error_each_and_the_status_tells(
    launch: Launch, idle: Callable[[Server], socket.socket]
) -> None:
    server = launch("--drain-timeout=3").wait_until_ready()
    with idle(server), ThreadPoolExecutor(STREAMS + 1) as pool:
        streams = [pool.submit(stream, server, 900) for _ in range(STREAMS)]
        wait_for_sequences(server, STREAMS)
        asking = pool.submit(ask_until_refused, server)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        wait_until(lambda: not is_ready(server), "sign of draining", 2.0)
        assert server.wait(3 + 12) == 3
        ends = [each.result()["error"] for each in streams]
        assert len(ends) == STREAMS and all("UNAVAILABLE: the server is shutting down" in end for end in ends)
        first, draining, refused = asking.result()
        assert (first, "UNAVAILABLE: " in draining, "refused" in refused) == ("200 ", True, True)
    assert time.monotonic() - begun > 3
    assert server.leftovers() == []


@pytest.fixture
def pause() -> Callable[[Server], AbstractContextManager[None]]:
    @contextmanager
    def pause_postprocessing(server: Server) -> Iterator[None]:
        """Pieces wait for the step in this time; tritonserver would end if it were a second."""
        (stub,) = server.processes_with("postprocessing/1/model.py")
        stub.suspend()
        try:
            yield
            time.sleep(0.3)
        finally:
            stub.resume()

    return pause_postprocessing


def test_an_error_comes_behind_the_pieces_of_its_stream(
    launch: Launch, pause: Callable[[Server], AbstractContextManager[None]]
) -> None:
    drain_seconds = 1.5
    server = launch(f"--drain-timeout={drain_seconds}").wait_until_ready()
    (engine,) = server.engines
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as client,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        streams = [pool.submit(stream, server, 900) for _ in range(STREAMS)]
        direct = GrpcStream(client, "fastertransformer_stream", tokens([2167, 716], new=900))
        wait_for_sequences(server, STREAMS + 1)
        with pause(server):
            time.sleep(0.2)
            engine.kill()
            with pytest.raises(InferenceServerException, match="UNAVAILABLE: the engine process ended"):
                direct.all()  # no step is behind it
        assert all("UNAVAILABLE: the engine process ended" in each.result()["error"] for each in streams)

        wait_until(lambda: is_ready(server), "engine", READY_SECONDS)
        streams = [pool.submit(stream, server, 900) for _ in range(STREAMS)]
        wait_for_sequences(server, STREAMS)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(drain_seconds - 0.3)
        with pause(server):
            time.sleep(0.3)
        assert server.wait() == 3
        assert all("UNAVAILABLE: the server is shutting down" in each.result()["error"] for each in streams)
    lines = server.log.read_text(errors="replace").splitlines()
    assert [line for line in lines if "Model 'ensemble_stream'" in line and "in-flight" in line] == []


def test_a_server_that_is_to_stop_takes_requests_until_proxies_have_seen_it(launch: Launch) -> None:
    server = launch("--drain-delay=3").wait_until_ready()
    server.process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    wait_until(lambda: not is_ready(server), "sign of draining", 2.0)
    while time.monotonic() < begun + 2.5:
        assert stream(server, 2)["finish_reason"] == "length"
    assert server.wait() == 0
    assert time.monotonic() > begun + 3


def test_with_enough_time_all_finish(launch: Launch) -> None:
    server = launch().wait_until_ready()
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream, server, 30) for _ in range(STREAMS)]
        wait_for_sequences(server, STREAMS)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert [each.result()["finish_reason"] for each in streams] == ["length"] * STREAMS


def test_an_idle_connection_does_not_hold_the_server_up(
    launch: Launch, tmp_path: Path, idle: Callable[[Server], socket.socket]
) -> None:
    server = launch("--model-repository", make_toy_repository(tmp_path / "toy")).wait_until_ready()
    with idle(server), socket.create_connection(("127.0.0.1", server.ports[0])):  # one that never asked
        time.sleep(0.2)
        assert server.stop(signal.SIGTERM) == 0
        lines = server.log.read_text(errors="replace")
    assert "HTTP service connections" not in lines  # which Triton counts down by
    assert server.leftovers() == []


def test_a_second_signal_kills_and_the_status_tells(launch: Launch) -> None:
    server = launch().wait_until_ready()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(stream, server, 900)
        wait_for_sequences(server, 1)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: not is_ready(server), "sign of draining")
        server.process.send_signal(signal.SIGINT)
        assert server.wait(10) == 3
        assert running.exception() is not None
    assert server.leftovers() == []
