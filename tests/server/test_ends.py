"""How a server ends when its terminal goes, and what becomes of all that a killed one left."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.server.conftest import CLOSE, Server, wait_until
from tests.server.test_serve import make_toy_repository

Launch = Callable[..., Server]


@pytest.fixture
def terminal() -> Iterator[None]:
    """Processes that are started do not ignore SIGHUP, as they do where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("ready", [False, True])
def test_a_terminal_that_hangs_up_stops_the_server(launch: Launch, tmp_path: Path, ready: bool) -> None:
    server = launch("--model-repository", make_toy_repository(tmp_path / "toy", seconds=0 if ready else 60))
    server.wait_until(lambda: "READY" in server.stdout if ready else server.tritonserver, "sign of life")
    server.process.send_signal(signal.SIGHUP)
    assert server.wait() == (0 if ready else 128 + signal.SIGHUP)
    assert server.leftovers() == []


def test_nohup_is_respected(launch: Launch, tmp_path: Path) -> None:
    toy = make_toy_repository(tmp_path / "toy")
    server = launch("--model-repository", toy, before=["nohup"]).wait_until_ready()
    server.process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(2)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_that_is_gone_does_not_keep_anything_alive(launch: Launch, tmp_path: Path) -> None:
    """What the launcher says then is an error of its own."""
    toy = make_toy_repository(tmp_path / "toy")
    server = launch("--model-repository", toy, before=["sh", "-c", 'exec "$@" 2>/dev/full', "sh"]).wait_until_ready()
    server.process.send_signal(signal.SIGHUP)
    assert server.wait() == 0
    assert server.leftovers() == []


@pytest.mark.parametrize("spared", ["none", "engine", "tritonserver"])
def test_the_next_start_removes_what_a_killed_server_left_and_nothing_else(
    temporary: Path, launch: Launch, tmp_path: Path, spared: str
) -> None:
    """What is spared stands still for ever."""
    toy = make_toy_repository(tmp_path / "toy")
    alive = launch("--model-repository", toy, temporary=temporary).wait_until_ready()
    for name in ("gptj-triton-mine", "gptj-triton-123_01234567", "gptj-engine-mine"):  # no server's
        (temporary / name).mkdir()
    before = set(temporary.iterdir())
    killed = launch(temporary=temporary).wait_until_ready()
    [engine], server = killed.engines, killed.tritonserver
    assert server is not None
    # None of them may see another one end.
    processes = {"launcher": killed.pid, "tritonserver": server.pid, "engine": engine.pid}
    for pid in processes.values():
        os.kill(pid, signal.SIGSTOP)
    for name, pid in processes.items():
        if name != spared:
            os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert set(temporary.iterdir()) > before and list(Path("/dev/shm").glob(f"gptj_{killed.pid}_*"))
    again = launch("--model-repository", toy, temporary=temporary).wait_until_ready()
    assert again.stop() == 0
    assert set(temporary.iterdir()) == before
    assert not list(Path("/dev/shm").glob(f"gptj_{killed.pid}_*"))
    wait_until(lambda: not killed.processes, "end of its processes")
    assert requests.get(f"http://{alive.http_url}/v2/models/echo/ready", headers=CLOSE, timeout=10).ok
    assert alive.stop() == 0
    for path in temporary.iterdir():
        path.rmdir()
