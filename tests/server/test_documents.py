"""The documents tell the truth: their commands, run in a clean copy of the tree, print what it says they print.

A document is followed as by a reader at one terminal, while `make serve` runs at another: its `sh` blocks, in order,
in one shell, with the environment of a user who has just logged in. Only the ports differ here. Knows nothing of what
the commands do.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, PORTS, SERVE, Ports, blocks, copy_tree, translated
from tests.server.conftest import free_ports
from tests.shell import clean_environment

READY_SECONDS = 600.0  # it installs everything first
DOCUMENT_SECONDS = 240.0


def follow(commands: list[str], project: Path, folder: Path) -> tuple[list[str], str]:
    """Runs commands in one shell until one fails; what each printed that was begun, and what they said on stderr."""
    files = [folder / str(index) for index in range(len(commands))]
    groups = [f"{{\n{command}\n}} > {file}" for command, file in zip(commands, files, strict=True)]
    (folder / "script").write_text("\n".join(["set -e", *groups, f"touch {folder / 'end'}"]))
    with (folder / "stderr").open("wb") as stderr:
        shell = subprocess.Popen(
            ["bash", str(folder / "script")],
            cwd=project,
            env={**clean_environment(), "COLUMNS": "100"},
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        shell.wait(DOCUMENT_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)  # what a document that failed has left running
        shell.wait()
    return [file.read_text() for file in files if file.exists()], (folder / "stderr").read_text(errors="replace")


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("clean") / "project"
    copy_tree(copy)
    return copy


@pytest.fixture(scope="module")
def ports() -> Ports:
    return dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))


@pytest.fixture(scope="module")
def serving(clean_copy: Path, ports: Ports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`make serve` in the clean copy, once for all documents."""
    log = tmp_path_factory.mktemp("log") / "serve"
    http, grpc, metrics = (ports[port] for port in PORTS[:3])
    arguments = f"ARGS=--http-port={http} --grpc-port={grpc} --metrics-port={metrics}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*SERVE.split(), arguments],
            cwd=clean_copy,
            env=clean_environment(),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while f"READY http://127.0.0.1:{http}" not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            time.sleep(0.2)
        yield clean_copy
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        process.wait(timeout=60)


@pytest.mark.timeout(READY_SECONDS + DOCUMENT_SECONDS + 60)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_the_commands_of_a_document_print_what_it_says(
    document: Path, serving: Path, ports: Ports, tmp_path: Path
) -> None:
    run = [block for block in blocks(document) if block.is_run]
    outputs, errors = follow([translated(block.command, ports) for block in run], serving, tmp_path)
    for block, printed in zip(run, outputs, strict=False):
        assert block.is_what_it_prints(printed, ports), f"{block.command}\nprinted\n{printed}\n{errors[-2000:]}"
    assert (tmp_path / "end").exists(), f"{run[len(outputs) - 1].command}\nfailed or took too long:\n{errors[-2000:]}"


def test_the_journey_begins_with_the_command_that_serves() -> None:
    for document in DOCUMENTS:
        if any(block.is_run for block in blocks(document)):
            first = next(block for block in blocks(document) if block.reason is None)
            assert first.serves, document.name


def test_every_block_is_a_command_or_what_one_prints_and_what_is_not_run_says_why() -> None:
    for document in DOCUMENTS:
        found = blocks(document)
        fences = re.findall(r"^ *```", document.read_text(), re.M)
        assert len(fences) == 2 * sum(1 if block.output is None else 2 for block in found), document.name
        reasons = re.findall(r"<!-- not run", document.read_text())
        assert len(reasons) == sum(block.reason is not None for block in found), document.name
