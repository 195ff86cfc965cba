"""Interpreters describe themselves, whatever their version."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gptj_triton.install.interpreter import VERSIONS, Interpreter, describe, inspect
from gptj_triton.project import PROJECT
from tests.unit.install.other_pythons import OTHERS


def test_this_interpreter_fits_and_has_all() -> None:
    own = describe()
    assert own == inspect(sys.executable)
    assert own.fits and own.library and own.has_pip


@pytest.mark.parametrize(
    ("version", "abi", "fits"),
    [
        *((version, f"cpython-{version.replace('.', '')}-x86_64-linux-gnu", True) for version in VERSIONS),
        ("3.9", "cpython-39-x86_64-linux-gnu", False),
        ("3.13", "cpython-313-x86_64-linux-gnu", False),
        ("3.11", "cpython-311-aarch64-linux-gnu", False),
        ("3.11", "cpython-311-i386-linux-gnu", False),
        ("3.12", "cpython-312-x86_64-linux-musl", False),
        ("3.11", "cpython-311d-x86_64-linux-gnu", False),
        ("3.10", "pypy310-pp73-x86_64-linux-gnu", False),
    ],
)
def test_which_interpreters_fit(version: str, abi: str, fits: bool) -> None:
    assert describe()._replace(version=version, abi=abi).fits is fits


def test_python_3_12_serves_only_where_a_package_can_be_compiled() -> None:
    newest = describe()._replace(version="3.12", abi="cpython-312-x86_64-linux-gnu")
    assert newest._replace(compiles=True).why_not == ""
    assert "must be compiled" in newest._replace(compiles=False).why_not
    assert describe()._replace(compiles=False).why_not == "" or describe().version == "3.12"


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.version)
def test_an_interpreter_of_another_version_says_so_itself(other: Interpreter) -> None:
    assert other.version not in VERSIONS
    assert not other.fits


@pytest.mark.parametrize("program", ["/usr/bin/true", "/usr/bin/false", "/nowhere/python3", str(PROJECT), ""])
def test_what_is_no_interpreter_is_none(program: str) -> None:
    assert inspect(program) is None


def test_a_library_of_another_machines_folder_is_not_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user who may not read the folder, which root always may: a path too long fails alike."""
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: "/" + "x" * 300 if name == "LIBDIR" else None)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    library = tmp_path / ".venv" / "lib" / f"libpython{describe().version}.so.1.0"
    library.parent.mkdir(parents=True)
    library.touch()
    assert describe().library == os.fspath(library)
