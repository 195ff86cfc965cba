"""A path that holds no checkpoint is called what it is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gptj_triton.checkpoint import files
from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.errors import ConfigError


def make(path: Path, kind: str) -> Path:
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"weights")
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "below a file":
        path.write_bytes(b"")
        return path / "below"
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "does not exist, expected the directory of a checkpoint"),
        ("link", "does not exist, expected the directory of a checkpoint"),
        ("below a file", "does not exist, expected the directory of a checkpoint"),
        ("file", "is a file, expected the directory of a checkpoint"),
        ("empty", "is an empty directory: no config.json and no config.ini in it"),
    ],
)
def test_what_is_no_directory_of_a_checkpoint_is_called_what_it_is(kind: str, message: str, tmp_path: Path) -> None:
    path = make(tmp_path / "checkpoint", kind)
    with pytest.raises(ConfigError, match=re.escape(f"{path} {message}")):
        ModelConfig.read(path)


def test_a_directory_that_cannot_be_read_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)  # the tests may run as root, who may read all
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} cannot be read: Permission denied")):
        find_checkpoint_files(tmp_path)


def test_fastertransformers_weights_without_their_configuration_are_told_what_they_need(tmp_path: Path) -> None:
    (tmp_path / files.FASTERTRANSFORMER_WEIGHTS).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"config\.ini is missing; .* the section \[gptj\] and the keys head_num, "):
        find_checkpoint_files(tmp_path)
