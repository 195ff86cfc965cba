"""The short forms of `make soak`, `make faults` and `make fuzz` hold, on servers of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
SECONDS = 300.0  # each takes a minute at most where nothing else runs


def run(tool: str, output: Path, *arguments: str) -> dict[str, Any]:
    """What the tool wrote; it must have found nothing."""
    command = [sys.executable, str(TOOLS / f"{tool}.py"), f"--output={output}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((output / f"{tool}.json").read_text())
    return found


@pytest.mark.timeout(SECONDS)
def test_a_short_soak_loses_no_request_and_leaves_nothing(tmp_path: Path) -> None:
    found = run("soak", tmp_path, "--minutes=0.4", "--short")
    assert found["broken"] == []
    assert sum(kind["sent"] for kind in found["requests"].values()) > 100
    assert {"tritonserver", "engine", "launcher"} <= {slope["process"] for slope in found["measurements"]}


@pytest.mark.alone
@pytest.mark.timeout(SECONDS)
def test_a_server_holds_in_a_few_faults_and_kills(tmp_path: Path) -> None:
    found = run("faults", tmp_path, "--short", "--", "--drain-timeout=5")
    assert all(case["ok"] for case in found["measurements"])


@pytest.mark.timeout(SECONDS)
def test_no_input_hangs_or_leaves_the_server_dead(tmp_path: Path) -> None:
    found = run("fuzz", tmp_path, "--short")
    assert found["measurements"] == []
    assert min(found["ends"][end] for end in ("answered", "refused")) > 50
