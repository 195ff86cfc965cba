"""Machines as people have them: paths with any letters, working directories full of files, IPv6, users
without a name."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from gptj_triton.serving.installation import find_triton
from gptj_triton.triton.stubs import STUB
from tests.server.conftest import CLOSE, PROJECT, Server
from tests.server.test_serve import EMBEDDED, generate, make_toy_repository

ODD = "a b é'$HOME\"[x]\n;&"
TRAPS = (
    *(
        "random",
        "queue",
        "numpy",
        "json",
        "torch",
        "tokenizers",
        "logging",
        "zmq",
        "psutil",
        "sitecustomize",
        "encodings",
    ),
    *("usercustomize", "gptj_triton", "model", "triton_python_backend_utils", "triton", "argparse", "requests"),
)
TOOLS = ("serve.py", "client.py", "convert_checkpoint.py", "make_configs.py")
WITHOUT_NAME = ("unshare", "--user", "--map-user=12345", "--map-group=12345")

Launch = Callable[..., Server]


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A directory of modules that leave a mark when something imports them, and fail."""
    directory = tmp_path / "trapped"
    directory.mkdir()
    for name in TRAPS:
        (directory / f"{name}.py").write_text(f"open({str(directory / 'sprung')!r}, 'a').write('{name} ')\n1 / 0\n")
    return directory


def sprung(directory: Path) -> str:
    """Which traps were imported."""
    mark = directory / "sprung"
    return mark.read_text() if mark.exists() else ""


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path


def ask_client(protocol: str, url: str, directory: Path | None = None) -> None:
    command: list[str | Path] = [sys.executable, PROJECT / "tools" / "client.py", "Once", "--url", url]
    done = subprocess.run([*command, "--protocol", protocol], cwd=directory, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def link_model(path: Path) -> Path:
    path.symlink_to(EMBEDDED)
    return path


def test_any_letters_in_the_paths_of_the_model_and_of_temporary_files_serve(
    temporary: Path, launch: Launch, tmp_path: Path
) -> None:
    model, python = link_model(tmp_path / f"model {ODD}"), tmp_path / f"python {ODD}"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    odd = make_directory(temporary / ODD)
    server = launch("--model", model, "--engine-python", python, temporary=odd).wait_until_ready()
    assert generate(server)["text_output"]
    assert server.stop() == 0
    assert not [*odd.iterdir(), *Path("/tmp").glob(f"gptj-*-{server.pid}_*")]


def test_a_damaged_checkpoint_is_named_by_the_users_path(launch: Launch, tmp_path: Path) -> None:
    damaged = tmp_path / "modèle endommagé"
    shutil.copytree(EMBEDDED, damaged)
    os.truncate(damaged / "model.safetensors", 5000)
    server = launch("--model", damaged)
    assert server.wait() == 1
    assert f"{damaged}/model.safetensors" in server.last_line


def test_a_project_in_a_path_of_any_letters_serves(launch: Launch, tmp_path: Path) -> None:
    project = make_directory(tmp_path / "a projét's $HOME")
    for name in ("gptj_triton", "backends", "model_repository", "tools"):
        shutil.copytree(PROJECT / name, project / name, copy_function=os.link, symlinks=True)
    venv.create(project / ".venv", symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(project / ".venv")}))
    (packages / "project.pth").write_text(str(project), encoding="utf-8")  # as `pip install -e` writes it
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    python = project / ".venv" / "bin" / "python"
    server = launch(project=project, python=python).wait_until_ready()
    assert generate(server)["text_output"]


def test_nothing_of_the_working_directory_is_imported(temporary: Path, launch: Launch, trapped: Path) -> None:
    long = temporary / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    link_model(trapped / "weights")
    server = launch(
        *("--model", "weights", "--tensor-para-size", "2", "--device", "cpu"),
        temporary=long,
        directory=trapped,
        changes={"LD_LIBRARY_PATH": ":", "PATH": f":{os.environ['PATH']}"},
    ).wait_until_ready()
    assert generate(server)["text_output"]
    assert server.stop() == 0
    assert sprung(trapped) == ""
    assert list(long.iterdir()) == []


@pytest.mark.parametrize("relative", [".", "below"])
def test_a_relative_directory_for_temporary_files_serves(temporary: Path, launch: Launch, relative: str) -> None:
    (temporary / relative).mkdir(exist_ok=True)
    server = launch(temporary=temporary, directory=temporary, changes={"TMPDIR": relative}).wait_until_ready()
    assert generate(server)["text_output"]
    assert server.engines[0].environ()["TMPDIR"] == str(temporary / relative)
    assert server.stop() == 0
    for path in temporary.rglob("*"):
        path.rmdir()  # its own, and empty


@pytest.mark.parametrize("tool", TOOLS)
def test_no_command_imports_from_the_working_directory(trapped: Path, tool: str) -> None:
    done = subprocess.run([sys.executable, PROJECT / "tools" / tool, "--help"], cwd=trapped, capture_output=True)
    assert (done.returncode, sprung(trapped)) == (0, ""), done.stderr


def test_a_working_directory_that_is_gone_is_none_of_the_launchers_business(launch: Launch, tmp_path: Path) -> None:
    toy = make_toy_repository(tmp_path / "toy")
    gone = make_directory(tmp_path / "gone")
    remove = ["sh", "-c", 'rmdir ../gone && exec "$@"', "sh"]
    launch("--model-repository", toy, directory=gone, before=remove).wait_until_ready()


def test_the_client_imports_nothing_from_the_working_directory(server: Server, trapped: Path) -> None:
    for protocol, url in (("generate", server.http_url), ("http", server.http_url), ("grpc", server.grpc_url)):
        ask_client(protocol, url, trapped)
    assert sprung(trapped) == ""


@pytest.mark.parametrize("cause", ["slow", "stub"])
def test_a_model_that_does_not_come_up_in_time_ends_the_start_with_its_name(
    launch: Launch, tmp_path: Path, cause: str
) -> None:
    toy = make_toy_repository(tmp_path / "toy", seconds=1000 if cause == "slow" else 0)
    if cause == "stub":  # Triton waits for ever for one that ends before it has said a word
        stub = toy / "echo" / STUB
        stub.write_text("#!/bin/sh\nexit 1\n")
        stub.chmod(0o755)
    server = launch("--model-repository", toy, "--start-timeout", "4")
    assert server.wait() == 1
    assert server.last_line == "serve.py: not ready within 4 s (--start-timeout): echo"
    assert server.leftovers() == []


def test_a_model_whose_name_triton_cannot_start_is_refused(launch: Launch, tmp_path: Path) -> None:
    toy = make_toy_repository(tmp_path / "toy")
    (toy / "echo").rename(toy / "an écho")
    server = launch("--model-repository", toy)
    assert server.wait() == 1
    assert server.last_line.startswith(f"serve.py: '{toy}/an écho': a model's name")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
def test_an_ipv6_address_is_served(launch: Launch) -> None:
    server = launch("--host", "::1").wait_until_ready()
    assert server.stdout == f"READY http://[::1]:{server.ports[0]}\n"
    assert requests.get(f"http://[::1]:{server.ports[2]}/metrics", headers=CLOSE, timeout=10).ok
    for protocol, port in (("generate", server.ports[0]), ("http", server.ports[0]), ("grpc", server.ports[1])):
        ask_client(protocol, f"[::1]:{port}")
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        other = launch("--host", "[::1]", "--grpc-port", taken.getsockname()[1])
        assert other.wait() == 1
        assert other.last_line.endswith(" on ::1: another program listens there")


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
def test_all_ipv6_addresses_may_be_served(launch: Launch, tmp_path: Path) -> None:
    server = launch("--host", "::", "--model-repository", make_toy_repository(tmp_path / "toy")).wait_until_ready()
    assert server.stdout == f"READY http://[::]:{server.ports[0]}\n"
    assert requests.get(f"http://[::1]:{server.ports[0]}/v2/health/ready", headers=CLOSE, timeout=10).ok


def may_be_nobody() -> bool:
    try:
        return subprocess.run([*WITHOUT_NAME, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_be_nobody(), reason="needs a user namespace")
def test_a_stub_that_its_owner_may_run_but_not_read_serves_and_stays_so(launch: Launch, tmp_path: Path) -> None:
    """Triton leaves it so when it has started one that ends unexpectedly."""
    triton = find_triton()
    packages = make_directory(tmp_path / "packages")
    package = triton.binary.parents[2]
    shutil.copytree(package, packages / package.name, copy_function=os.symlink)
    assert triton.libraries is not None
    (packages / triton.libraries.name).symlink_to(triton.libraries)
    stub = packages / triton.stub.relative_to(package.parent)
    stub.unlink()
    shutil.copy(triton.stub, stub)
    stub.chmod(0o100)
    server = launch(before=WITHOUT_NAME, changes={"PYTHONPATH": str(packages)}).wait_until_ready()
    assert generate(server)["text_output"]
    assert server.processes_with(str(stub))
    assert stat.S_IMODE(stub.stat().st_mode) == 0o100


def test_a_tritonserver_laid_out_as_in_nvidias_image_serves(launch: Launch, tmp_path: Path) -> None:
    """`bin`, `lib`, which the loader finds, and `backends/python` with a stub for one Python."""
    triton = find_triton()
    shutil.copytree(triton.binary.parent, tmp_path / "opt" / "bin")
    shutil.copytree(triton.python_backend, tmp_path / "opt" / "backends" / "python")
    shutil.copy(triton.stub, tmp_path / "opt" / "backends" / "python")
    assert triton.libraries is not None
    (tmp_path / "opt" / "lib").symlink_to(triton.libraries)
    program = tmp_path / "opt" / "bin" / "tritonserver"
    server = launch("--tritonserver", program, changes={"LD_LIBRARY_PATH": str(tmp_path / "opt" / "lib")})
    assert generate(server.wait_until_ready())["text_output"]
    assert server.processes_with(str(program))
    assert server.processes_with(str(tmp_path / "opt" / "backends" / "python" / triton.stub.name))


@pytest.mark.skipif(not may_be_nobody(), reason="needs a user namespace")
@pytest.mark.parametrize("home", [None, "/proc"])
def test_a_user_without_a_name_and_a_home_is_served(launch: Launch, tmp_path: Path, home: str | None) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in tokenizer["merges"]]
    (model / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    nobody = {"HOME": home, "USER": None, "LOGNAME": None, "XDG_CACHE_HOME": None, "HF_HOME": None}
    server = launch("--model", model, before=WITHOUT_NAME, changes=nobody).wait_until_ready()
    assert generate(server)["text_output"]
    assert server.stop() == 0
    assert server.leftovers() == []
