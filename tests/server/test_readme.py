"""The README tells the truth: its commands, run in a clean copy of the tree, print what it says they print.

Every `sh` block is run, except where a comment before it says why not. A block of another language right after it is
what it prints; only the ports differ here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from local_server import free_ports

PROJECT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"(?P<mark><!-- not run: [^\n]+ -->\n)?```sh\n(?P<command>.+?)```\n"
    r"(?:\n```(?:json|text)\n(?P<output>.+?)```\n)?",
    re.S,
)
READY_SECONDS = 600.0  # it installs everything first


@dataclass(frozen=True)
class Block:
    """One command of the README and what it prints, if the README says."""

    command: str
    output: str | None
    skipped: bool


def blocks() -> list[Block]:
    found = BLOCK.finditer((PROJECT / "README.md").read_text())
    return [Block(each["command"].strip(), each["output"], each["mark"] is not None) for each in found]


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would give somebody else of this tree."""
    copy = tmp_path_factory.mktemp("clean") / "project"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def ports() -> dict[str, str]:
    """The README's ports, and those that stand for them here."""
    return dict(zip(("8000", "8001", "8002"), map(str, free_ports(3)), strict=True))


@pytest.fixture(scope="module")
def serving(clean_copy: Path, ports: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`make serve`, the README's first command, in the clean copy."""
    log = tmp_path_factory.mktemp("log") / "serve"
    http, grpc, metrics = ports.values()
    arguments = f"ARGS=--http-port={http} --grpc-port={grpc} --metrics-port={metrics}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["make", "serve", arguments], cwd=clean_copy, stdout=output, stderr=output, start_new_session=True
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


@pytest.mark.timeout(READY_SECONDS + 120)
def test_the_commands_of_the_readme_print_what_it_says(serving: Path, ports: dict[str, str]) -> None:
    first, *others = blocks()
    assert first.command.startswith("make serve")
    run = [block for block in others if not block.skipped]
    assert len(run) >= 4
    for block in run:
        command = block.command
        for written, here in ports.items():
            command = command.replace(f"localhost:{written}", f"localhost:{here}")
        if "client.py" in command:
            command += f" --url localhost:{ports['8000']}"
        environment = {**os.environ, "COLUMNS": "100"}
        done = subprocess.run(
            command, shell=True, cwd=serving, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if block.output is None:
            assert done.stdout.strip(), command
        elif block.output.startswith("{"):
            assert json.loads(done.stdout) == json.loads(block.output), command
        else:
            assert done.stdout.split() == block.output.split(), command


def test_a_command_that_is_not_run_says_why() -> None:
    reasons = re.findall(r"<!-- not run: ([^\n]+) -->\n```sh\n", (PROJECT / "README.md").read_text())
    assert len(reasons) == sum(block.skipped for block in blocks()) and all(reasons)
