"""The checkout is found around the package or in the current directory, and its absence is said in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gptj_triton.project import PROJECT, find_checkout, require_checkout
from tests.shell import clean_environment


def test_the_checkout_is_around_an_editable_package(tmp_path: Path) -> None:
    (tmp_path / "checkout" / "model_repository").mkdir(parents=True)
    assert find_checkout(tmp_path / "checkout" / "gptj_triton", tmp_path) == tmp_path / "checkout"


def test_a_package_elsewhere_takes_the_current_directory(tmp_path: Path) -> None:
    assert find_checkout(Path("/lib/site-packages/gptj_triton"), tmp_path) == tmp_path


def test_a_directory_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    require_checkout(PROJECT)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} is no checkout of gptj-triton: run this command in one$"):
        require_checkout(tmp_path)


def test_the_client_is_imported_from_anywhere(tmp_path: Path) -> None:
    code = "from gptj_triton.client import Client; print(Client.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Client\n", "")
