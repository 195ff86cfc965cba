"""The script of the Job that fetches weights: once, and whole or not at all. The hub is a server of this test, which
the hub's own client asks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptj_triton.project import PROJECT
from tests.manifests import KUBERNETES, one, render

SCRIPT = KUBERNETES / "components" / "weights" / "fetch-weights.sh"
EMBEDDED = PROJECT / "model_repository" / "fastertransformer" / "1" / "storyteller"
ID, COMMIT = "someone/storyteller", "0123456789" * 4
UNWANTED = "flax_model.msgpack"  # for other libraries, and as large as the weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A repository of the hub as GPT-J 6B's is: weights as torch writes them, and files for others."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in EMBEDDED.glob("*.json"):
        shutil.copy(path, folder)
    torch.save(load_file(EMBEDDED / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / UNWANTED).write_bytes(b"x")
    return folder


class Hub(ThreadingHTTPServer):
    """What https://huggingface.co answers for one revision of one model."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.fetched: list[str] = []


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        names = sorted(each.name for each in self.server.folder.iterdir())
        if path == f"api/models/{ID}/revision/float16":
            files = [{"rfilename": name} for name in names]
            body = json.dumps({"id": ID, "modelId": ID, "sha": COMMIT, "siblings": files}).encode()
        elif path == f"api/models/{ID}/tree/{COMMIT}":
            sizes = {name: (self.server.folder / name).stat().st_size for name in names}
            tree = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
            body = json.dumps(tree).encode()
        elif path in {f"{ID}/resolve/{COMMIT}/{name}" for name in names}:
            body = (self.server.folder / path.rpartition("/")[2]).read_bytes()
            if with_body:
                self.server.fetched.append(path.rpartition("/")[2])
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_request(self, *_: object) -> None:
        pass

    def log_error(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(weights: Path) -> Iterator[Hub]:
    with Hub(weights) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(target: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The Job's command, with the values of its manifest where no others are given."""
    [container] = one(render("gpu"), "Job", "gptj-weights")["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]} | {"TARGET": str(target)} | changes
    home = target.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PROJECT": str(PROJECT), **given}
    [shell, _] = container["command"]
    return subprocess.run([shell, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=150)


def test_weights_of_the_hub_are_fetched_and_converted_once(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "models" / "storyteller"
    target.parent.mkdir()
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = run(target, MODEL=ID, HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" in hub.fetched and UNWANTED not in hub.fetched
    assert {each.dtype for each in load_file(target / "model.safetensors").values()} == {torch.float16}
    assert [each.name for each in target.parent.iterdir() if each.name != "home"] == [target.name]

    hub.fetched.clear()
    again = run(target, MODEL=ID, HF_ENDPOINT=endpoint)
    assert (again.returncode, again.stdout, hub.fetched) == (0, f"{target} is there already\n", [])


def test_a_run_that_fails_leaves_no_target(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "models" / "storyteller"
    target.parent.mkdir()
    failed = run(target, MODEL="someone/else", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert failed.returncode != 0 and "someone/else" in failed.stderr
    assert not target.exists()
