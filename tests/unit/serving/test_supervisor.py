"""What the launcher does while tritonserver takes connections and answers none. A program that does so stands in for
it, as tritonserver hangs only where it has a fault."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gptj_triton.bench.local_server import free_ports

HUNG = 60.0  # seconds: a call that the loop waited for takes the timeout of HTTP, which is as long here
AT_ONCE = 20.0  # for what takes a moment, on a busy machine

# Says ready `answers` times, then hangs.
STAND_IN = """
    import socket, sys
    port, answers = map(int, sys.argv[1:])
    server, taken = socket.create_server(("127.0.0.1", port)), []
    while True:
        taken.append(server.accept()[0])
        if len(taken) <= answers:
            taken[-1].recv(4096)
            taken[-1].sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
            taken[-1].close()
        else:
            print("hangs", flush=True)
"""
LAUNCHER = """
    import pathlib, sys
    from gptj_triton.serving import triton_api
    from gptj_triton.serving.errors import ServeError
    from gptj_triton.serving.process import TritonProcess
    from gptj_triton.serving.restarts import Restarts
    from gptj_triton.serving.run_directory import RunDirectory
    from gptj_triton.serving.signals import StopRequestedError
    from gptj_triton.serving.supervisor import Supervisor

    folder, program, port, answers, hung = sys.argv[1:]
    triton_api.HTTP_SECONDS = float(hung)
    run = RunDirectory(pathlib.Path(folder))
    run.stubs.mkdir()
    api = triton_api.TritonApi(f"http://127.0.0.1:{port}", {})

    def start(relay, restarts):
        return TritonProcess([sys.executable, "-c", program, port, answers], {}, relay)

    supervisor = Supervisor(start, [], [int(port)], api, run, Restarts(0, 300.0), 1800.0, 0.0, 5.0, 0.5)
    try:
        sys.exit(supervisor.serve(lambda: print("READY", flush=True)))
    except StopRequestedError:
        print("stopped")
    except ServeError as error:
        print(error)
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Starts a launcher whose server answers so often, and returns when that hangs."""
    (port,) = free_ports(1)
    started: list[subprocess.Popen[str]] = []

    def start(answers: int) -> subprocess.Popen[str]:
        program, hanging = textwrap.dedent(LAUNCHER), textwrap.dedent(STAND_IN)
        command = [sys.executable, "-c", program, str(tmp_path), hanging, str(port), str(answers), str(HUNG)]
        log = tmp_path / "log"
        with log.open("w") as stderr:
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True))
        deadline = time.monotonic() + HUNG
        while "hangs" not in log.read_text():
            assert time.monotonic() < deadline and started[-1].poll() is None, log.read_text()
            time.sleep(0.02)
        return started[-1]

    yield start
    for each in started:
        if each.poll() is None:
            for process in [*psutil.Process(each.pid).children(), each]:  # a stopped server hears no other signal
                process.kill()
        each.communicate()


def test_a_signal_is_heard_while_a_server_that_starts_does_not_answer(
    launch: Callable[[int], subprocess.Popen[str]],
) -> None:
    launcher = launch(0)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.communicate(timeout=AT_ONCE)[0] == "stopped\n"


def test_a_server_that_was_stopped_is_seen_while_it_does_not_answer(
    launch: Callable[[int], subprocess.Popen[str]],
) -> None:
    launcher = launch(0)
    (server,) = psutil.Process(launcher.pid).children()
    server.suspend()
    assert "was stopped by a signal" in launcher.communicate(timeout=AT_ONCE)[0]


def test_a_server_that_cannot_be_told_that_it_is_not_ready_is_drained_at_once(
    launch: Callable[[int], subprocess.Popen[str]], tmp_path: Path
) -> None:
    engine = tmp_path / "engines" / "one"
    engine.mkdir(parents=True)
    (engine / "frontend.sock").touch()  # one that has no engine
    launcher = launch(1)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.communicate(timeout=AT_ONCE)[0] == "READY\n"
    assert "stopping when all requests are answered" in (tmp_path / "log").read_text()
