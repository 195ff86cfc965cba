"""What is ignored of the files beside a tokenizer.json, where nobody made one of all of them, is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptj_triton.text.tokenizer_files import CLEAN_UP, CLEAN_UP_BPE, ignored_settings

CONFIG = "tokenizer_config.json"


def ignored(folder: Path, name: str, content: dict[str, Any]) -> list[str]:
    (folder / name).write_text(json.dumps(content))
    return [line.removeprefix(f"{folder}/") for line in ignored_settings(folder)]


@pytest.fixture
def folder(toy_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copy(toy_checkpoint / "tokenizer.json", tmp_path)
    return tmp_path


def test_neighbours_that_agree_with_it_are_no_matter(folder: Path, storyteller: Path) -> None:
    assert ignored_settings(folder) == ignored_settings(storyteller) == []
    assert ignored(folder, CONFIG, {"bos_token": "<|endoftext|>", "add_prefix_space": False, "pad_token": None}) == []
    assert ignored(folder, "added_tokens.json", {"<|endoftext|>": 299}) == []
    assert ignored(folder, CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}) == []


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (CONFIG, {"add_prefix_space": True}, f"{CONFIG}: add_prefix_space is true"),
        (CONFIG, {"pad_token": "<pad>"}, f"{CONFIG}: the token '<pad>' {{\"special\": true}}"),
        (
            CONFIG,
            {"added_tokens_decoder": {"299": {"content": "<|endoftext|>", "special": False}}},
            f'{CONFIG}: the token \'<|endoftext|>\' {{"content": "<|endoftext|>", "special": false, "id": 299}}',
        ),
        ("added_tokens.json", {"<x>": 300}, "added_tokens.json: the token '<x>' {\"id\": 300}"),
        (
            "special_tokens_map.json",
            {"additional_special_tokens": [{"content": "<x>"}]},
            "special_tokens_map.json: the token '<x>' {\"special\": true}",
        ),
        (
            CONFIG,
            {CLEAN_UP: True, CLEAN_UP_BPE: True},
            f"{CONFIG}: {CLEAN_UP_BPE} has no effect: it changes text that a stream has sent already",
        ),
    ],
    ids=str,
)
def test_what_is_ignored_is_named(folder: Path, name: str, content: dict[str, Any], line: str) -> None:
    assert ignored(folder, name, content) == [line]
