"""What stands in place of a file is called what it is, with what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gptj_triton.errors import ConfigError
from gptj_triton.stand_ins import refuse_stand_in

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"


def test_a_git_lfs_pointer_is_refused_with_the_command_that_gets_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text(POINTER)
    message = f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {tmp_path}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        refuse_stand_in(file)


def test_a_link_to_nothing_is_refused_with_its_target(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to("../../blobs/0123")
    with pytest.raises(ConfigError, match=re.escape(f"{file} is a link to ../../blobs/0123, which does not exist")):
        refuse_stand_in(file)


def test_files_that_are_there_and_those_that_are_not_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("config.json")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("config.json", "link.json", "absent.json", "pipe.json", "."):
        refuse_stand_in(tmp_path / name)
