"""Every command of tools/ starts as a user starts it: from any directory, in a shell without settings of Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.shell import clean_environment

TOOLS = sorted((Path(__file__).resolve().parents[2] / "tools").glob("*.py"))


def test_a_clean_environment_has_nothing_of_python_and_no_virtual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin:/usr/bin")
    environment = clean_environment()
    assert environment["PATH"] == "/usr/bin"
    assert not {name for name in environment if name.startswith(("PYTHON", "VIRTUAL_ENV"))}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_help_names_the_command(tool: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(tool), "--help"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {tool.name} ")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_command_is_a_few_lines(tool: Path) -> None:
    assert len(tool.read_text().splitlines()) < 12
