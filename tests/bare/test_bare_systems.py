"""README's commands, as an ordinary user runs them on a system that has make, curl and a Python, and little else."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptj_triton.bench.local_server import free_ports
from tests.bare.roots import HOME, KEYRINGS, USER, Root, System, delete_root, make_root
from tests.documents import DOCUMENTS, PORTS, SERVE, Ports, blocks, copy_tree, translated

PROJECT = HOME / "project"
SERVING = ("make", "curl")
DEBIAN_12 = System("bookworm", (*SERVING, "python3"))
DEBIAN_13 = System("trixie", (*SERVING, "python3"))
UBUNTU_24 = System(
    "noble",
    (*SERVING, "python3"),
    components="main,universe",
    mirror=os.environ.get("UBUNTU_MIRROR", ""),
    script="gutsy",
    keyring="ubuntu-archive-keyring.gpg",
)
INSTALL_SECONDS = 2400.0  # 2.9 GB, where torch is taken with CUDA
LITTLE_SECONDS = 300.0
NO_SUCH_PLACE = "http://127.0.0.1:9"

pytestmark = pytest.mark.timeout(INSTALL_SECONDS + 600)


@pytest.fixture(scope="module", params=[DEBIAN_12, DEBIAN_13, UBUNTU_24], ids=lambda system: system.suite)
def system(request: pytest.FixtureRequest) -> System:
    made: System = request.param
    if made is UBUNTU_24 and not made.mirror:
        pytest.skip("UBUNTU_MIRROR names no archive of Ubuntu's packages")
    if not (KEYRINGS / made.keyring).exists():
        pytest.skip(
            f"{KEYRINGS / made.keyring} is not here: it is in the package ubuntu-keyring of Debian 13 and Ubuntu"
        )
    return made


@pytest.fixture(scope="module")
def root(system: System) -> Iterator[Root]:
    """The system with a clean copy of this project in the user's home."""
    made = make_root(system)
    try:
        copy_tree(Path(f"{made.folder}{PROJECT}"))
        assert made.run(f"chown -R {USER}:{USER} {PROJECT}", user="root").returncode == 0
        yield made
    finally:
        delete_root(made)


def test_make_serve_then_curl(root: Root, system: System, tmp_path: Path) -> None:
    ports: Ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    http, grpc, metrics = (ports[port] for port in PORTS[:3])
    serve = f"{SERVE} ARGS='--http-port={http} --grpc-port={grpc} --metrics-port={metrics}'"
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = root.command(f"cd {PROJECT}; exec {serve}", **uv_settings())
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + INSTALL_SECONDS
        while f"READY http://127.0.0.1:{http}" not in log.read_text():
            if system is not DEBIAN_12 and "error sending request for url" in log.read_text():
                pytest.skip("uv's downloads are not reached from here")
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        [ask] = [block for block in blocks(DOCUMENTS[0]) if block.is_run and block.command.startswith("curl")]
        printed = root.run(translated(ask.command, ports)).stdout
        assert ask.is_what_it_prints(printed, ports), printed
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        process.wait(timeout=60)


def test_with_venv_only_the_library_is_fetched(root: Root, system: System) -> None:
    if system is not DEBIAN_12:
        pytest.skip("its Python is fetched whole")
    installed = root.run("apt-get -qq update && apt-get -qq --no-install-recommends install python3-venv", user="root")
    assert installed.returncode == 0, installed.stdout
    made = root.run(f"cd {PROJECT}; python3 -m gptj_triton.install other && ls other/lib/libpython3.*.so.1.0")
    assert made.returncode == 0, made.stdout
    assert "no shared library: apt fetches it" in made.stdout
    assert "ensurepip" not in made.stdout


def test_without_a_network_it_is_said_what_to_install(root: Root) -> None:
    """A network is there, but nothing is found in it: neither apt's archives nor PyPI."""
    begin = time.monotonic()
    nowhere = shlex.quote(NO_SUCH_PLACE)
    settings = {"PIP_RETRIES": "0", "PIP_INDEX_URL": NO_SUCH_PLACE, "UV_PYTHON_INSTALL_MIRROR": NO_SUCH_PLACE}
    done = root.run(f"cd {PROJECT}; export http_proxy={nowhere}; make VENV=offline serve", **settings)
    assert done.returncode == 2, done.stdout
    assert time.monotonic() - begin < LITTLE_SECONDS
    assert "make: no Python that serves: install CPython 3.10, 3.11 or 3.12 with venv and its shared" in done.stdout
    assert "pip install" not in done.stdout


def test_a_folder_of_another_user_is_named(root: Root) -> None:
    done = root.run(f"cd {PROJECT}; python3 -m gptj_triton.install /srv/.venv")
    assert (done.returncode, done.stdout.splitlines()) == (
        1,
        ["make: /srv cannot be written by this user; use a copy of the project of your own"],
    )


def uv_settings() -> dict[str, str]:
    """Where uv finds Pythons, if this machine names another place than uv's own."""
    return {name: value for name, value in os.environ.items() if name.startswith("UV_PYTHON_")}
