"""What clients see when the engine stands still, hangs, dies or cannot start, and when it is drained."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
import zmq

from gptj_triton.process.messages import Drain
from gptj_triton.project import EMBEDDED_MODEL
from tests.server.conftest import CLOSE, SOON_SECONDS, Server, start, wait_for_sequences, wait_until

LONG: dict[str, Any] = {"text_input": "Once upon a time", "max_tokens": 900}
GONE = "the engine process ended unexpectedly"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkpoint, which a test may take away."""
    return Path(shutil.copytree(EMBEDDED_MODEL, tmp_path_factory.mktemp("model") / "checkpoint"))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    """A server whose engine comes to harm; its processes were started with the umask 0."""
    open_umask = ["sh", "-c", 'umask 0; exec "$@"', "sh"]
    launched = start(tmp_path_factory.mktemp("faulty"), "--model", str(model), before=open_umask)
    try:
        yield launched.wait_until_ready()
    finally:
        launched.close()


def post(server: Server, path: str, **fields: Any) -> requests.Response:
    url = f"http://{server.http_url}/v2/models/{path}"
    fields = {**LONG, **fields}
    fields["min_length"] = fields["max_tokens"]
    return requests.post(url, json=fields, headers=CLOSE, timeout=120)


def last_of_stream(server: Server, **fields: Any) -> dict[str, Any]:
    lines = [line for line in post(server, "ensemble_stream/generate_stream", **fields).text.splitlines() if line]
    return dict(json.loads(lines[-1].removeprefix("data: ")))


def serves(server: Server) -> bool:
    return all(post(server, f"{name}/generate", max_tokens=2).ok for name in ("ensemble", "ensemble_stream"))


def engine_directory(server: Server) -> Path:
    [directory] = server.temporary.glob("gptj-triton-*/engines/*")
    return directory


def test_a_stopped_engine_is_an_error_within_5_s_and_a_new_one_serves(faulty: Server) -> None:
    [engine] = faulty.engines
    with ThreadPoolExecutor(10) as pool:
        whole = [pool.submit(post, faulty, "ensemble/generate", seed=number) for number in range(4)]
        streams = [pool.submit(last_of_stream, faulty, seed=number) for number in range(4)]
        wait_for_sequences(faulty, 8)
        os.kill(engine.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        late: Future[requests.Response] = pool.submit(post, faulty, "ensemble/generate", timeout=1_000_000)
        assert late.result(SOON_SECONDS).json()["finish_reason"] == "timeout"
        assert time.monotonic() - stopped < 2.5, "timeout is the engine's alone"
        messages = [each.result(SOON_SECONDS).json()["error"] for each in whole]
        messages += [each.result(SOON_SECONDS)["error"] for each in streams]
        assert time.monotonic() - stopped < 5
    assert all(f"UNAVAILABLE: {GONE}" in message for message in messages), messages
    wait_until(lambda: serves(faulty), "new engine")
    assert engine not in faulty.engines


def test_a_timeout_is_kept_with_the_tokens_there_are_though_a_step_takes_long(faulty: Server) -> None:
    [engine] = faulty.engines
    with ThreadPoolExecutor(2) as pool:
        asked = time.monotonic()
        stream = pool.submit(last_of_stream, faulty, timeout=2_500_000)
        whole = pool.submit(post, faulty, "ensemble/generate", timeout=2_500_000, return_num_output_tokens=True)
        wait_for_sequences(faulty, 2)
        os.kill(engine.pid, signal.SIGSTOP)
        answer = whole.result(SOON_SECONDS).json()
        assert stream.result(SOON_SECONDS)["finish_reason"] == answer["finish_reason"] == "timeout"
        assert time.monotonic() - asked < 4
        os.kill(engine.pid, signal.SIGCONT)
    assert 0 < answer["num_output_tokens"] < 900
    wait_until(lambda: serves(faulty), "answer")
    assert faulty.engines == [engine]


def test_an_engine_whose_checkpoint_cannot_be_read_for_6_s_serves_again(faulty: Server, model: Path) -> None:
    [engine] = faulty.engines
    away = model.with_name("away")
    model.rename(away)
    os.kill(engine.pid, signal.SIGKILL)
    ended = time.monotonic()
    wait_until(lambda: not list(engine_directory(faulty).glob("*.ready")), "word that it is not ready")
    seen = set()
    while time.monotonic() < ended + 6:
        answer = post(faulty, "ensemble/generate", max_tokens=2)
        assert not answer.ok
        seen.add(answer.json()["error"])
        time.sleep(0.2)
    assert all("UNAVAILABLE: the engine process ended" in message and "/" not in message for message in seen), seen
    away.rename(model)
    wait_until(lambda: serves(faulty), "new engine", 60)
    assert len(list(engine_directory(faulty).glob("*.ready"))) == 2
    assert len(faulty.engines) == 1


def test_a_request_under_which_the_engine_died_twice_is_refused_and_others_are_served(faulty: Server) -> None:
    deadly = {"text_input": "The wolf", "seed": 66}
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            wait_until(lambda: serves(faulty), "engine")
            asked = pool.submit(post, faulty, "ensemble/generate", **deadly)
            wait_for_sequences(faulty, 1)
            os.kill(faulty.engines[0].pid, signal.SIGKILL)
            assert GONE in asked.result(SOON_SECONDS).json()["error"]
    wait_until(lambda: serves(faulty), "engine")
    refused = post(faulty, "ensemble/generate", **deadly)
    assert refused.status_code == 400
    assert "the engine process ended unexpectedly 2 times" in refused.json()["error"]
    assert "UNAVAILABLE" not in refused.json()["error"]
    assert post(faulty, "ensemble/generate", **deadly | {"seed": 67, "max_tokens": 3}).ok


def test_nobody_else_can_use_the_files_of_the_engine(faulty: Server) -> None:
    directory = engine_directory(faulty)
    for path in (directory.parent.parent, directory.parent, directory, *directory.iterdir()):
        assert stat.S_ISLNK(path.lstat().st_mode) or path.stat().st_mode & 0o077 == 0, path
    kinds = {path.suffix or path.name for path in directory.iterdir()}
    assert kinds == {".pid", ".sock", ".ready", "heartbeat", "lock", "gptj_triton"}


def test_a_drained_engine_refuses_finishes_and_cuts(launch: Callable[..., Server]) -> None:
    server = launch().wait_until_ready()
    directory = engine_directory(server)
    with ThreadPoolExecutor(80) as pool:
        whole = [pool.submit(post, server, "ensemble/generate", seed=number) for number in range(40)]
        streams = [pool.submit(last_of_stream, server, seed=number) for number in range(30)]
        brief = pool.submit(post, server, "ensemble/generate", max_tokens=3)
        wait_for_sequences(server, 70)
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(f"ipc://{directory}/engine.sock")
            socket.send(msgspec.msgpack.encode(Drain(1.0)))
        wait_until(lambda: not list(directory.glob("*.ready")), "word that it is not ready")
        refused = post(server, "ensemble/generate", max_tokens=1)
        assert refused.json()["error"].endswith("UNAVAILABLE: the server is shutting down")
        assert brief.result(SOON_SECONDS).ok
        answers = [each.result(SOON_SECONDS).json() for each in whole] + [each.result(SOON_SECONDS) for each in streams]
        wait_until((directory / "drained").exists, "word of the end")
    cut = [answer for answer in answers if "UNAVAILABLE: the server is shutting down" in answer.get("error", "")]
    assert json.loads((directory / "drained").read_text()) == {"cut": len(cut)}
    assert cut and all("error" in answer or answer["finish_reason"] for answer in answers)
