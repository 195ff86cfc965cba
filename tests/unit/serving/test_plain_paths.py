"""Paths that Triton cannot be told, and what stands for them."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest

from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.process.temporary import is_plain, temporary_directory
from gptj_triton.serving.plain_paths import PlainPaths


def test_a_plain_path_stays(tmp_path: Path) -> None:
    paths = PlainPaths(tmp_path)
    assert paths.directory(tmp_path, "model") == tmp_path
    assert paths.program("/bin/sh", "python") == "/bin/sh"


@pytest.mark.parametrize("name", ["a b", "é", "a'b", "$HOME", "a;b", "a\nb", 'a"b', "[a]", "a\\b", "a:b"])
def test_any_other_gets_a_link(tmp_path: Path, name: str) -> None:
    given, paths = tmp_path / name, PlainPaths(tmp_path)
    given.mkdir()
    plain = paths.directory(given, "model")
    assert is_plain(plain) and plain.samefile(given)
    assert paths.in_users_words(f"{plain}/config.json is missing") == f"{given}/config.json is missing"
    program = given / "echo"
    program.symlink_to("/bin/echo")
    assert subprocess.check_output([paths.program(str(program), "python"), "a  b"]) == b"a  b\n"


def test_what_lies_beside_a_split_checkpoint_is_found(tmp_path: Path) -> None:
    given = tmp_path / "a b" / "2-gpu"
    given.mkdir(parents=True)
    for path in (given / "config.ini", given.parent / "config.json"):
        path.touch()
    plain = PlainPaths(tmp_path).directory(given, "model")
    found = find_checkpoint_files(plain).find("config.json")
    assert is_plain(plain) and found is not None and found.samefile(given.parent / "config.json")


@pytest.mark.parametrize("name", ["a b", "é", "x" * 128])
def test_temporary_files_go_elsewhere_where_the_path_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    assert temporary_directory() == Path("/tmp")
