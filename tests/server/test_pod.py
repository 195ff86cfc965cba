"""The pod of deploy/kubernetes, run as its manifest says: probes, a key, a process that dies, and the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pods
from tests.manifests import Object, one, quantity, render
from tests.server.conftest import wait_until

KEY = "k" * 40
REQUEST = {"text_input": "Once upon a time", "max_tokens": 5}
AUTHORIZATION = ("--header", f"Authorization: Bearer {KEY}")
pytestmark = pytest.mark.skipif(not pods.can_run(), reason="containers need root")


@pytest.fixture(scope="module")
def specification() -> Object:
    found: Object = one(render("cpu"), "Deployment")["spec"]["template"]["spec"]
    return found


@pytest.fixture(scope="module")
def container(specification: Object) -> Object:
    return dict(specification["containers"][0])


@pytest.fixture(scope="module")
def pod(specification: Object, container: Object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pods.Pod]:
    started = pods.start(tmp_path_factory.mktemp("pod"), specification, {"gptj-api-keys": {"api-keys": f"{KEY}\n"}})
    try:
        started.wait_for(container, "startupProbe")
        yield started
    finally:
        started.close()


def ask(pod: pods.Pod, model: str, call: str, request: Object, *options: str) -> subprocess.Popen[str]:
    url = f"http://127.0.0.1:8000/v2/models/{model}/{call}"
    command = pod.curl_command(url, "--max-time", "30", "--data", json.dumps(request), *options)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_the_process_has_what_the_manifest_gives_and_no_more(pod: pods.Pod, specification: Object) -> None:
    for pid in pod.processes():
        status = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M))
        assert status["Uid"].split() == [str(specification["securityContext"]["runAsUser"])] * 4
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_keys_are_hidden_without_rights(pod: pods.Pod, container: Object) -> None:
    assert all(pod.status(container, probe) == 200 for probe in ("startupProbe", "readinessProbe", "livenessProbe"))
    with ask(pod, "ensemble", "generate", REQUEST) as refused:
        assert "restricted" in refused.communicate()[0]
    with ask(pod, "ensemble", "generate", REQUEST, *AUTHORIZATION) as answered:
        assert json.loads(answered.communicate()[0])["sequence_length"] == 9
    assert KEY not in "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in pod.processes())
    assert "--api-key-file" not in pod.log, "a warning: others may read it, or see it"


def test_a_process_that_dies_is_replaced_and_collected(pod: pods.Pod, container: Object) -> None:
    """The first process of a container inherits what others leave, and must collect it."""
    victims = [pid for pid, (name, _) in pod.processes().items() if name == "tritonserver"]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pod.status(container, "readinessProbe") != 200, "loss of ready")
    pod.wait_for(container, "readinessProbe")
    wait_until(lambda: [each for each in pod.processes().values() if each[1] == "Z"] == [], "end of zombies", 10)


def test_it_ends_within_its_grace_and_answers_what_it_has(pod: pods.Pod, specification: Object) -> None:
    limit = quantity(specification["containers"][0]["resources"]["limits"]["memory"])
    used = json.loads(subprocess.run([*pod.runc, "events", "--stats", pod.name], capture_output=True).stdout)
    assert used["data"]["memory"]["usage"]["max"] < limit
    long = {**REQUEST, "max_tokens": 200, "min_tokens": 200}
    with ask(pod, "ensemble_stream", "generate_stream", long, *AUTHORIZATION, "--no-buffer") as stream:
        assert stream.stdout is not None and stream.stdout.readline().startswith("data:")
        began = time.monotonic()
        assert pod.stop() == 0
        took = time.monotonic() - began
        pieces = [json.loads(line.removeprefix("data:")) for line in stream.stdout if line.startswith("data:")]
    assert pieces[-1]["finish_reason"] == "length"
    leave = specification["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert took < specification["terminationGracePeriodSeconds"] - leave
