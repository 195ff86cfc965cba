"""The launcher's promises about starting, stopping and failing, kept with real servers.

Where a model has to be slow or broken a toy project stands in: the launcher's own files beside models that echo."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.server.conftest import PROJECT, READY_SECONDS, SOON_SECONDS, STOP_SECONDS, Server, wait_until

EMBEDDED = PROJECT / "model_repository" / "fastertransformer" / "1" / "storyteller"

TOY_MODEL = """
import json, subprocess, time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        if parameters["orphan"]["string_value"]:
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
        time.sleep(float(parameters["seconds"]["string_value"]))
        if parameters["error"]["string_value"]:
            raise ValueError(parameters["error"]["string_value"])

    def execute(self, requests):
        texts = [pb_utils.get_input_tensor_by_name(request, "IN").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", text)]) for text in texts]
"""

TOY_CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "IN" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "OUT" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""

Launch = Callable[..., Server]


def make_toy_repository(repository: Path, seconds: float = 0, error: str = "", orphan: str = "") -> Path:
    """A model repository whose one model loads for `seconds`, and then fails when there is an `error`; with `orphan` it
    starts a process that nobody stops."""
    (repository / "echo" / "1").mkdir(parents=True)
    (repository / "echo" / "1" / "model.py").write_text(TOY_MODEL)
    parameters = {"seconds": str(seconds), "error": error, "orphan": orphan}
    lines = [
        f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}' for name, value in parameters.items()
    ]
    (repository / "echo" / "config.pbtxt").write_text(TOY_CONFIG + "\n".join(lines))
    return repository


def generate(server: Server, **fields: Any) -> dict[str, Any]:
    answer = requests.post(
        f"http://{server.http_url}/v2/models/ensemble/generate",
        json={"text_input": "Once upon a time", "max_tokens": 4, **fields},
        headers={"Connection": "close"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_ready_is_all_that_stands_on_stdout(server: Server) -> None:
    generate(server)
    assert server.stdout == f"READY http://{server.http_url}\n"


def test_sigterm_stops_the_server_the_stubs_and_the_engine(launch: Launch) -> None:
    server = launch().wait_until_ready()
    assert server.engines
    assert server.stop(signal.SIGTERM) == 0
    assert server.leftovers() == []


def test_killing_tritonserver_ends_all_the_rest_and_is_reported(launch: Launch) -> None:
    server = launch("--max-restarts=0").wait_until_ready()
    assert server.tritonserver is not None
    server.tritonserver.kill()
    assert server.wait() == 1
    assert server.leftovers() == []
    assert server.last_line.startswith("serve.py: tritonserver was ended by SIGKILL; not started again: ")


def test_two_ranks_write_the_text_of_one_and_end_with_the_server(server: Server, launch: Launch) -> None:
    two = launch("--tensor-para-size=2", "--device=cpu").wait_until_ready()
    assert len(two.processes_with("gptj_triton.engine.eager.sharded_model")) == 1
    assert generate(two, max_tokens=20)["text_output"] == generate(server, max_tokens=20)["text_output"]
    assert two.stop() == 0
    assert two.leftovers() == []


def test_sigint_while_the_engine_starts_leaves_nothing_behind(launch: Launch) -> None:
    server = launch()
    server.wait_until(lambda: server.engines, "engine")
    assert server.stop() == 128 + signal.SIGINT
    assert server.leftovers() == []
    assert server.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_model_loads_stops_at_once(launch: Launch, tmp_path: Path, number: signal.Signals) -> None:
    server = launch("--model-repository", make_toy_repository(tmp_path / "toy", seconds=60))
    server.wait_until(lambda: "echo" in server.log.read_text(errors="replace"), "sign of loading")
    server.process.send_signal(number)
    assert server.wait(SOON_SECONDS) == 128 + number
    assert server.leftovers() == []


@pytest.mark.parametrize("killed", [False, True])
def test_a_process_that_outlives_its_server_is_ended(launch: Launch, tmp_path: Path, killed: bool) -> None:
    toy = make_toy_repository(tmp_path / "toy", orphan="yes")
    server = launch("--max-restarts=0", "--model-repository", toy).wait_until_ready()
    assert server.processes_with("sleep")
    assert server.tritonserver is not None
    if killed:
        server.tritonserver.kill()
    else:
        server.process.send_signal(signal.SIGINT)
    server.wait()
    assert server.leftovers() == []


def test_a_killed_launcher_takes_its_server_along(launch: Launch, tmp_path: Path) -> None:
    server = launch("--model-repository", make_toy_repository(tmp_path / "toy")).wait_until_ready()
    server.process.kill()
    wait_until(lambda: not server.processes, "end of the server")
    assert not list(Path("/dev/shm").glob(f"gptj_{server.pid}_*"))
    for staged in server.temporary.iterdir():  # nobody is left to remove these files
        shutil.rmtree(staged)


def test_a_model_that_fails_is_named_with_its_cause_in_one_line(launch: Launch, tmp_path: Path) -> None:
    server = launch("--model-repository", make_toy_repository(tmp_path / "toy", error="no bread\\nand no wine"))
    assert server.wait() == 1
    assert server.last_line.startswith("serve.py: model echo cannot be loaded: ")
    assert server.last_line.endswith("ValueError: no bread and no wine")
    assert server.stdout == ""


def test_a_damaged_checkpoint_is_named_in_one_line(launch: Launch, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(EMBEDDED, damaged)
    os.truncate(damaged / "model.safetensors", 5000)
    server = launch("--model", str(damaged))
    assert server.wait() == 1
    assert server.last_line.startswith("serve.py: model fastertransformer cannot be loaded: ")
    assert "model.safetensors" in server.last_line
    assert server.stdout == ""


def test_a_missing_model_directory_is_one_line(launch: Launch, tmp_path: Path) -> None:
    server = launch("--model", str(tmp_path / "nowhere"))
    assert server.wait() == 1
    assert server.log.read_text() == f"serve.py: --model {tmp_path / 'nowhere'}: no such directory\n"


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_taken_port_is_one_line(launch: Launch, index: int) -> None:
    name = ("--http-port", "--grpc-port", "--metrics-port")[index]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = launch(name, str(port))
        assert server.wait() == 1
    assert server.log.read_text() == f"serve.py: {name} {port} on 127.0.0.1: another program listens there\n"


def test_an_option_that_tritonserver_refuses_is_quoted(launch: Launch, tmp_path: Path) -> None:
    server = launch("--model-repository", make_toy_repository(tmp_path / "toy"), "--", "--no-such-option")
    assert server.wait() == 1
    assert server.last_line == "serve.py: tritonserver ended with status 1: unrecognized option '--no-such-option'"


def test_all_addresses_may_be_served(launch: Launch, tmp_path: Path) -> None:
    server = launch("--host", "0.0.0.0", "--model-repository", make_toy_repository(tmp_path / "toy")).wait_until_ready()
    assert server.stdout == f"READY http://0.0.0.0:{server.ports[0]}\n"


def test_the_printed_command_serves_the_committed_repository(launch: Launch, tmp_path: Path) -> None:
    printed = launch("--print-command")
    assert printed.wait() == 0
    # The printed lines are all there is: nothing of this test's own environment helps.
    by_hand = Server(tmp_path, printed.temporary, printed.process, printed.ports)
    environment = {"PATH": "/usr/bin:/bin", "GPTJ_TEST_LAUNCH": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        shell = subprocess.Popen(["bash", "-c", printed.stdout], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not is_ready(by_hand):
            assert shell.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert generate(by_hand)["text_output"]
        assert by_hand.tritonserver is not None
        by_hand.tritonserver.send_signal(signal.SIGINT)
        assert shell.wait(STOP_SECONDS) == 0
        wait_until(lambda: not by_hand.processes, "end of the engine")  # which tritonserver does not wait for
    finally:
        for process in by_hand.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def is_ready(server: Server) -> bool:
    try:
        url = f"http://{server.http_url}/v2/health/ready"
        return bool(requests.get(url, headers={"Connection": "close"}, timeout=5).ok)
    except requests.RequestException:
        return False


def test_help_needs_no_server() -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / "tools" / "serve.py"), "--help"], capture_output=True, check=True, timeout=60
    )
    assert b"--tensor-para-size" in done.stdout
