"""What the launcher does when tritonserver, a stub or the engine dies or stands still: nothing hangs, and it is served
again. One server for all of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from tests.server.conftest import CLOSE, Server, start, wait_for_sequences, wait_until
from tests.server.test_serve import generate, is_ready, make_toy_repository

pytestmark = pytest.mark.alone
Launch = Callable[..., Server]

# The promises are 5 s until nothing hangs, and 5 s (tritonserver) or 10 s (a stub) until it is served again. A busy
# machine may need more.
HANGS_AT_MOST, SERVED_AGAIN = 5.0, 10.0


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    launched = start(tmp_path_factory.mktemp("supervised"), "--max-restarts=100")
    try:
        yield launched.wait_until_ready()
    finally:
        launched.close()


def stub(server: Server, model: str) -> psutil.Process:
    """The stub of a model."""
    for process in server.processes:
        if process.name().startswith("triton_python") and f"/{model}/" in process.cmdline()[1]:
            return process
    raise AssertionError(f"no stub of {model}")


def long_request(server: Server, seconds: float = 60.0) -> float:
    """Asks for many tokens; how long it took until there was an answer of any kind."""
    begun = time.monotonic()
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    fields = {"text_input": "Once upon a time", "max_tokens": 900, "min_tokens": 900}
    try:
        requests.post(url, json=fields, headers=CLOSE, timeout=seconds)
    except requests.Timeout:
        return float("inf")
    except requests.RequestException:
        pass
    return time.monotonic() - begun


def is_served(server: Server) -> bool:
    try:
        generate(server)
    except (requests.RequestException, AssertionError):
        return False
    return True


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("tritonserver", signal.SIGKILL),
        ("tritonserver", signal.SIGSTOP),
        ("postprocessing", signal.SIGSEGV),
        ("fastertransformer", signal.SIGKILL),
        ("fastertransformer", signal.SIGSTOP),
    ],
)
def test_nothing_hangs_and_it_is_served_again(supervised: Server, victim: str, number: signal.Signals) -> None:
    wait_until(lambda: is_served(supervised), "answer")
    (engine,) = supervised.engines
    server = supervised.tritonserver
    assert server is not None
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(long_request, supervised) for _ in range(3)]
        wait_for_sequences(supervised, 3)
        begun = time.monotonic()
        os.kill(server.pid if victim == "tritonserver" else stub(supervised, victim).pid, number)
        later = pool.submit(long_request, supervised)
        assert all(each.result() < HANGS_AT_MOST for each in [*running, later])
        wait_until(lambda: is_served(supervised), "answer", SERVED_AGAIN - (time.monotonic() - begun))
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    assert supervised.engines == [engine]  # its weights are not read again
    assert "; starting tritonserver again" in supervised.log.read_text(errors="replace")
    assert supervised.stdout.count("READY") == 1


def test_a_request_that_kills_tritonserver_kills_it_once(supervised: Server) -> None:
    """Triton 2.51 divides by zero."""
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["Once"]}]
    outputs = [{"name": "text_output", "parameters": {"classification": 1}}]
    before = supervised.tritonserver
    url = f"http://{supervised.http_url}/v2/models/ensemble/infer"
    with pytest.raises(requests.ConnectionError):
        requests.post(url, json={"inputs": inputs, "outputs": outputs}, timeout=30)
    wait_until(lambda: is_served(supervised), "answer", 5.0)
    assert supervised.tritonserver != before


def test_what_a_dead_server_had_is_removed(supervised: Server) -> None:
    """Shared memory, and stubs that would wait for ever."""
    regions = f"gptj_{supervised.pid}_*"
    before = set(Path("/dev/shm").glob(regions))
    assert supervised.tritonserver is not None
    supervised.tritonserver.kill()
    wait_until(lambda: is_served(supervised), "answer")
    after = set(Path("/dev/shm").glob(regions))
    assert len(after) == len(before) and not after & before
    assert len([each for each in supervised.processes if each.name().startswith("triton_python")]) == 4


def test_frontends_learn_how_often_their_server_was_started_again(supervised: Server) -> None:
    assert supervised.tritonserver is not None
    before = int(supervised.tritonserver.environ()["GPTJ_TRITON_RESTARTS"])
    supervised.tritonserver.kill()
    wait_until(lambda: is_served(supervised), "answer")
    assert int(supervised.tritonserver.environ()["GPTJ_TRITON_RESTARTS"]) == before + 1


def test_a_connection_that_is_open_at_the_death_does_not_hold_the_port(supervised: Server) -> None:
    with requests.Session() as open_one:
        assert open_one.get(f"http://{supervised.http_url}/v2/health/live", timeout=10).ok
        assert supervised.tritonserver is not None
        supervised.tritonserver.kill()
        wait_until(lambda: is_served(supervised), "answer", SERVED_AGAIN)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_ready_is_false_while_the_engine_is_down(supervised: Server, number: signal.Signals) -> None:
    wait_until(lambda: is_served(supervised) and is_ready(supervised), "answer")
    server = supervised.tritonserver
    (engine,) = supervised.engines
    os.kill(engine.pid, number)
    wait_until(lambda: not is_ready(supervised), "sign of a dead engine", 5.0)
    wait_until(lambda: is_ready(supervised), "new engine")
    assert is_served(supervised)
    assert supervised.engines not in ([], [engine]) and supervised.tritonserver == server


def test_a_model_that_is_unloaded_in_order_is_no_fault(
    launch: Launch, tmp_path: Path, admin_key: tuple[str, dict[str, str]]
) -> None:
    option, headers = admin_key
    server = launch(option, "--model-repository", make_toy_repository(tmp_path / "toy")).wait_until_ready()
    running = server.tritonserver
    url = f"http://{server.http_url}/v2/repository/models/echo"
    for action in ("unload", "load", "unload"):
        assert requests.post(f"{url}/{action}", headers=headers, timeout=30).ok
    time.sleep(5)
    assert server.tritonserver == running and "again" not in server.log.read_text(errors="replace")


def test_a_server_that_dies_too_often_is_given_up(launch: Launch, tmp_path: Path) -> None:
    toy = make_toy_repository(tmp_path / "toy")
    server = launch("--max-restarts=1", "--model-repository", toy).wait_until_ready()
    assert server.tritonserver is not None
    server.tritonserver.kill()
    wait_until(lambda: "serve.py: ready again" in server.log.read_text(errors="replace"), "restart")
    assert server.tritonserver is not None
    server.tritonserver.kill()
    assert server.wait() == 1
    assert server.leftovers() == []
    limits = "not started again: 1 restarts in 300 s (--max-restarts)"
    assert server.last_line == f"serve.py: tritonserver was ended by SIGKILL; {limits}"
