"""Finding tritonserver and this Python's library, and staging what they need, with the installed ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_triton.install.interpreter import PYTHON
from gptj_triton.project import PROJECT
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.installation import (
    Triton,
    find_python_library,
    find_triton,
    stage_backends,
    with_private_regions,
)
from gptj_triton.triton.stubs import STUB

BACKEND = PROJECT / "backends" / "fastertransformer"


def make_container_layout(root: Path, stub: bytes | None) -> Path:
    """A directory like /opt/tritonserver, with `stub` as the contents of its stub; returns its bin."""
    (root / "bin").mkdir(parents=True)
    program = root / "bin" / "tritonserver"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    backend = root / "backends" / "python"
    backend.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).write_bytes(name.encode())
    if stub is not None:
        (backend / STUB).write_bytes(stub)
    return program.parent


def test_a_tritonserver_on_path_is_taken_before_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_container_layout(tmp_path, f"needs libpython{PYTHON}.so.1.0".encode())
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    triton = find_triton()
    assert triton == Triton(
        folder / "tritonserver", tmp_path / "backends" / "python", tmp_path / "backends" / "python" / STUB, None
    )


def test_a_named_tritonserver_is_taken_before_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = f"needs libpython{PYTHON}.so.1.0".encode()
    monkeypatch.setenv("PATH", str(make_container_layout(tmp_path / "first", stub)), prepend=os.pathsep)
    program = make_container_layout(tmp_path / "named", stub) / "tritonserver"
    monkeypatch.chdir(tmp_path)
    for given in (program, program.relative_to(tmp_path)):
        assert find_triton(given) == Triton(
            program, tmp_path / "named/backends/python", tmp_path / "named/backends/python" / STUB, None
        )


@pytest.mark.parametrize("name", ["absent", "folder", "text"])
def test_a_named_tritonserver_that_cannot_be_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ServeError, match=f"--tritonserver {tmp_path / name}: no such program"):
        find_triton(tmp_path / name)


@pytest.mark.parametrize("stub", [None, b"needs libpython3.7m.so.1.0"])
def test_a_stub_that_does_not_fit_this_python_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: bytes | None
) -> None:
    monkeypatch.setenv("PATH", str(make_container_layout(tmp_path, stub)), prepend=os.pathsep)
    with pytest.raises(ServeError, match="stub") as refused:
        find_triton()
    assert STUB in str(refused.value)
    assert PYTHON in str(refused.value)


def test_the_library_is_that_of_the_running_interpreter() -> None:
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).Py_GetVersion.restype = ctypes.c_char_p\n"
    code += (
        "f = ctypes.CDLL(sys.argv[1]).Py_GetVersion; f.restype = ctypes.c_char_p; print(f().decode() == sys.version)"
    )
    done = subprocess.run([sys.executable, "-c", code, find_python_library()], capture_output=True, check=True)
    assert done.stdout == b"True\n"


def test_staging_twice_gives_a_whole_stage_again(tmp_path: Path) -> None:
    triton = find_triton()
    stage_backends(tmp_path / "stage", triton, BACKEND)
    stage = stage_backends(tmp_path / "stage", triton, BACKEND)
    python = stage.backends / "python"
    assert {path.name for path in python.iterdir()} == {
        "libtriton_python.so", STUB, "triton_python_backend_utils.py"
    }  # fmt: skip
    assert not (python / "libtriton_python.so").is_symlink()  # Triton refuses a link there
    assert os.access(python / STUB, os.X_OK)
    assert (stage.backends / "fastertransformer" / "model.py").samefile(BACKEND / "model.py")


def test_the_loader_finds_nothing_of_the_interpreters_folder_but_its_library(tmp_path: Path) -> None:
    stage = stage_backends(tmp_path / "stage", find_triton(), BACKEND)
    assert [path.name for path in stage.libraries[0].iterdir()] == [f"libpython{PYTHON}.so.1.0"]


def test_the_shell_lines_set_what_the_environment_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/some/where else")
    stage = stage_backends(tmp_path / "a stage", find_triton(), BACKEND)
    script = "\n".join([*stage.shell_exports, 'echo "$LD_LIBRARY_PATH"', 'echo "$PATH"'])
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True, text=True)
    assert done.stdout.splitlines() == [stage.environment["LD_LIBRARY_PATH"], stage.environment["PATH"]]
    assert stage.environment["PATH"].startswith(str(Path(sys.prefix) / "bin") + os.pathsep)


def test_an_empty_search_path_gains_no_empty_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the loader an empty entry means the current directory."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    stage = stage_backends(tmp_path / "stage", find_triton(), BACKEND)
    assert "" not in stage.environment["LD_LIBRARY_PATH"].split(os.pathsep)


def test_no_search_path_holds_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, ":/usr/x::.:lib:")
    environment = stage_backends(tmp_path / "stage", find_triton(), BACKEND).environment
    for name in ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH"):
        assert f":{environment[name]}".endswith(f":/usr/x:{tmp_path}/lib")
        assert str(tmp_path) not in environment[name].split(os.pathsep)


def test_a_change_of_the_staged_stubs_mode_is_none_of_the_installed_ones(tmp_path: Path) -> None:
    triton = find_triton()
    before = triton.stub.stat().st_mode
    stub = stage_backends(tmp_path / "stage", triton, BACKEND).backends / "python" / STUB
    stub.chmod(0o100)
    assert triton.stub.stat().st_mode == before


def test_a_stub_that_may_not_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_container_layout(tmp_path, f"needs libpython{PYTHON}.so.1.0".encode())
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    with pytest.raises(ServeError, match=f"{STUB} may not be run by this user"):
        stage_backends(tmp_path / "stage", find_triton(), BACKEND)


def test_regions_get_no_mode_of_their_own_but_in_a_library_that_names_it_otherwise() -> None:
    assert with_private_regions(b"ELF\0open\0fchmod\0read\0") == b"ELF\0open\0fsync\0\0read\0"
    for other in (b"\0fchmodat\0", b"\0fchmod\0 \0fchmod\0"):
        assert with_private_regions(other) == other
