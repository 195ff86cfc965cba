"""What cannot work on a machine is said before anything is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptj_triton.install.machine import check_folder, check_machine, check_system, libc_version
from gptj_triton.install.programs import InstallError


@pytest.mark.parametrize("libc", ["glibc 2.35", "glibc 2.36", "glibc 2.41.9000", "glibc 3.0"])
def test_a_system_that_serves(libc: str) -> None:
    check_system("Linux", "x86_64", libc)


@pytest.mark.parametrize(
    ("system", "machine", "libc", "words"),
    [
        ("Darwin", "arm64", "", "Darwin on arm64"),
        ("Linux", "aarch64", "glibc 2.36", "Linux on aarch64"),
        ("Linux", "i686", "glibc 2.36", "Linux on i686"),
        ("Linux", "x86_64", "glibc 2.28", "glibc 2.28"),
        ("Linux", "x86_64", "glibc 2.4", "glibc 2.4"),
        ("Linux", "x86_64", "", "not glibc"),
    ],
)
def test_a_system_that_cannot_serve_is_named(system: str, machine: str, libc: str, words: str) -> None:
    with pytest.raises(InstallError, match=words):
        check_system(system, machine, libc)


def test_this_machine_serves(tmp_path: Path) -> None:
    assert libc_version().startswith("glibc 2.")
    check_machine(tmp_path)


def test_too_little_disk_is_refused_and_too_little_for_cuda_is_said(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"has 1\.5 GB free; 2\.0 GB are needed"):
        check_folder(tmp_path, 1.5)
    assert "4.0 GB free: enough for torch without CUDA" in str(check_folder(tmp_path, 4.0))
    assert check_folder(tmp_path, 20.0) is None


def test_a_folder_that_cannot_stand_in_a_search_path_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    with pytest.raises(InstallError, match=r"a:b.* search path"):
        check_folder(folder, 20.0)


@pytest.mark.skipif(not os.statvfs("/proc").f_flag & os.ST_NOEXEC, reason="/proc is not mounted noexec here")
def test_a_disk_from_which_nothing_runs_is_named() -> None:
    with pytest.raises(InstallError, match=r"^/proc .*noexec"):
        check_folder(Path("/proc"), 20.0)
