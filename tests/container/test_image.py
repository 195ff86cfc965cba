"""The image that deploy/Containerfile makes on Debian: built with buildah, run with podman as an unknown user, with a
read-only root, 64 MB of shared memory and no network."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptj_triton.project import EMBEDDED_MODEL
from tests.container.engine import HEALTHCHECK, IMAGE, PODMAN, PYTHON, STRICT, Container, build, make_base, need, run
from tests.documents import DOCUMENTS, blocks

BUILD_SECONDS = 1800.0
READY_SECONDS = 120.0
SOON_SECONDS = 60.0
MOST_BYTES = 1.6e9  # the installed project, without the base

pytestmark = pytest.mark.timeout(BUILD_SECONDS)


@pytest.fixture(scope="module")
def image() -> str:
    need("buildah", "podman", "runc", "debootstrap")
    make_base()
    build(IMAGE)
    return IMAGE


@pytest.fixture(scope="module")
def start(image: str) -> Iterator[Callable[..., Container]]:
    """Starts containers; `options` are podman's, `arguments` serve.py's."""
    started = list[Container]()

    def start_one(*arguments: str, options: tuple[str, ...] = (), tmpfs: str = "exec") -> Container:
        container = Container(f"gptj-triton-test-{secrets.token_hex(4)}")
        started.append(container)
        done = run(
            *PODMAN,
            "run",
            "--detach",
            f"--name={container.name}",
            *STRICT,
            f"--tmpfs=/tmp:{tmpfs},mode=1777",
            *options,
            image,
            *arguments,
        )
        assert done.returncode == 0, done.stderr
        return container

    yield start_one
    for container in started:
        container.remove()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def wait_until_ready(container: Container) -> Container:
    assert wait_until(lambda: "READY http" in container.log() or container.status() != "running", READY_SECONDS)
    assert "READY http://0.0.0.0:8000" in container.log(), container.log()
    return container


@pytest.fixture(scope="module")
def served(start: Callable[..., Container]) -> Container:
    return wait_until_ready(start())


def readmes_request() -> tuple[str, str]:
    """The request of README's first curl, and its answer, both as JSON."""
    [block] = [each for each in blocks(DOCUMENTS[0]) if each.is_run and each.command.startswith("curl")]
    [request] = re.findall(r"-d '(.+)'", block.command, re.S)
    assert block.output is not None
    return request, block.output


def test_it_answers_as_readme_says(served: Container) -> None:
    request, answer = readmes_request()
    code = "import sys, urllib.request as u; url = 'http://127.0.0.1:8000/v2/models/ensemble/generate'\n"
    printed = served.python(f"{code}print(u.urlopen(url, {request.encode()!r}).read().decode())")
    assert json.loads(printed) == json.loads(answer)


def test_the_healthcheck_passes(served: Container) -> None:
    done = run(*PODMAN, "healthcheck", "run", served.name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_holds_what_serves_and_nothing_else(served: Container) -> None:
    found = json.loads(
        served.python(
            "import json, os, pathlib; root = pathlib.Path('/opt/gptj-triton')\n"
            "files = [path for path in root.rglob('*') if path.is_file() and not path.is_symlink()]\n"
            "kinds = '.safetensors', '.bin', '.pt'\n"
            "weights = [str(path) for path in files if path.suffix in kinds and path.stat().st_size > 1e5]\n"
            "folders = sorted(path.name for path in root.iterdir())\n"
            "left = [path for path in ('/source', '/root/.cache', '/usr/bin/gcc', '/models') if os.path.exists(path)]\n"
            "print(json.dumps([sum(path.stat().st_size for path in files), weights, folders, left]))"
        )
    )
    size, weights, folders, left = found
    assert size < MOST_BYTES
    assert [Path(path).parent.name for path in weights] == [EMBEDDED_MODEL.name]
    assert not {".git", "tests", "docs"} & set(folders)
    assert left == []


def test_process_1_collects_orphans_and_writes_to_tmp_alone(served: Container) -> None:
    assert served.python("open('/proc/1/cmdline').read().split('\\0')[1]") == ""
    served.run("sh", "-c", "sleep 0.2 & exit")
    states = "import psutil; print([p.name() for p in psutil.process_iter() if p.status() == psutil.STATUS_ZOMBIE])"
    assert wait_until(lambda: served.python(states) == "[]", SOON_SECONDS)
    assert served.run("touch", "/opt/gptj-triton/x").returncode != 0
    assert served.python("import os; print(os.getuid())") == "12345"


def test_the_healthcheck_fails_while_the_engine_stands_still(served: Container) -> None:
    stop = (
        "import os, psutil, signal\n"
        "[e] = [p for p in psutil.process_iter() if 'gptj_triton.triton.engine_process' in p.cmdline()]\n"
        "os.kill(e.pid, signal.SIGSTOP)"
    )
    served.python(stop)
    failed = served.run(HEALTHCHECK, "--timeout", "2")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1), failed.stderr
    # A new engine is started in its place.
    assert wait_until(lambda: served.run(HEALTHCHECK).returncode == 0, SOON_SECONDS), served.log()


def test_sigterm_lets_a_stream_finish(served: Container) -> None:
    ask = [
        "tools/client.py",
        "Once upon a time",
        "--stream",
        "--max-tokens",
        "400",
        "--min-length",
        "400",
        "--seed",
        "1",
    ]
    command = [*PODMAN, "exec", served.name, PYTHON, "-u", *ask]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.read(1), client.communicate()
        begin = time.monotonic()
        served.stop()
        seconds = time.monotonic() - begin
        rest, error = client.communicate()
    assert client.returncode == 0, error
    assert len(rest) > 800
    assert (served.status(), seconds < 50) == ("0", True), served.log()
    assert "stopping when all requests are answered" in served.log()


def test_with_keys_and_weights_in_volumes_it_serves_too(start: Callable[..., Container], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "api-keys").write_text(f"{secrets.token_hex(16)}\n")
    (keys / "api-keys").chmod(0o444)
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "models" / "tales")
    volumes = f"{keys}:/run/secrets/gptj-triton:ro", f"{tmp_path}/models:/models:ro"
    options = tuple(f"--volume={volume}" for volume in volumes)
    container = start(
        *("--model", "/models/tales", "--api-key-file", "/run/secrets/gptj-triton/api-keys"), options=options
    )
    wait_until_ready(container)
    assert container.run(HEALTHCHECK).returncode == 0
    refused = container.run(HEALTHCHECK, "--api-key-file", "/opt/gptj-triton/LICENSE")
    assert refused.returncode == 1
    container.stop()
    assert container.status() == "0"


@pytest.mark.parametrize(
    ("arguments", "tmpfs", "message"),
    [
        ((), "noexec", "on a file system that may hold programs"),
        (("--model", "/models/none"), "exec", "/models/none"),
        (("--no-such-option",), "exec", "--no-such-option"),
    ],
    ids=["noexec", "model", "option"],
)
def test_what_cannot_work_ends_at_once_with_the_cause(
    start: Callable[..., Container], arguments: tuple[str, ...], tmpfs: str, message: str
) -> None:
    container = start(*arguments, tmpfs=tmpfs)
    assert wait_until(lambda: container.status() in ("1", "2"), SOON_SECONDS), container.log()
    assert message in container.log().splitlines()[-1]
