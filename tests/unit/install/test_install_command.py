"""`make` makes its virtual environment, or says what is missing before anything is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_triton.install.interpreter import Interpreter, inspect
from gptj_triton.project import PROJECT
from tests.shell import clean_environment
from tests.unit.install.other_pythons import OTHERS

NO_NETWORK = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PATH": "/nowhere"}


def install(python: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "gptj_triton.install", str(folder)]
    environment = {**clean_environment(), **environment}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=150)


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    assert install(sys.executable, folder).returncode == 0
    made = inspect(folder / "bin" / "python")
    assert made is not None and made.fits and made.library and made.has_pip
    (folder / "kept").touch()
    assert install(sys.executable, folder).returncode == 0
    assert (folder / "kept").exists()


def test_a_half_made_environment_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    assert install(sys.executable, folder).returncode == 0
    made = inspect(folder / "bin" / "python")
    assert made is not None and made.has_pip


@pytest.mark.parametrize("other", OTHERS[-1:], ids=lambda other: other.version)
def test_without_a_network_it_is_said_what_to_install(tmp_path: Path, other: Interpreter) -> None:
    done = install(other.executable, tmp_path / ".venv", **NO_NETWORK)
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert f"is Python {other.version}" in first
    assert "uv fetches Python 3.11" in first
    assert last.startswith("make: no Python that serves: install CPython 3.10, 3.11 or 3.12")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
@pytest.mark.parametrize("python", ["/nowhere/python3", "false", "python2.7"])
def test_make_says_that_there_is_no_python(tmp_path: Path, python: str) -> None:
    command = ["make", "serve", f"VENV={tmp_path}/.venv", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"make: {python} is no Python 3.7 or newer with its standard library: apt-get install"
    )
    assert not (tmp_path / ".venv").exists()
