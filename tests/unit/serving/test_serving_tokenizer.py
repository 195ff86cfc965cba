"""The tokenizer that is served is the one of `transformers`, whatever the files beside tokenizer.json say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gptj_triton.project import EMBEDDED_MODEL
from gptj_triton.serving.checkpoint import ModelRequest, find_checkpoint
from gptj_triton.serving.errors import ServeError
from gptj_triton.text.detokenizer import Detokenizer
from gptj_triton.text.tokenizer import PromptTokenizer
from gptj_triton.text.tokenizer_files import ignored_settings

TEXTS = [
    *(
        "king",
        " king",
        "  king  ",
        "king .",
        "don't do n't , ok ? !",
        "<x> a<x>b <x>",
        "\n\n king\t",
        "\u00a0king",
        " ",
    ),
    *(
        "<|endoftext|>king<|endoftext|>",
        "‘Émile!’ 🦊 日本語",
        "e\u0301 é",
        "<pad>a <pad> b",
        "Ġking",
        "éé",
        "KING, 1,000.5",
    ),
]
GENERIC = json.loads((EMBEDDED_MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
GPT2 = GENERIC | {"tokenizer_class": "GPT2Tokenizer"}
PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
ADDED: dict[str, dict[str, Any]] = {
    "4095": PLAIN | {"content": "<|endoftext|>"},
    "4096": PLAIN | {"content": "<x>", "lstrip": True, "rstrip": True},
    "4097": PLAIN | {"content": "éé", "special": False},
}
MAP = {"additional_special_tokens": ["<x>"], "pad_token": {**PLAIN, "content": "<pad>", "lstrip": True}}
PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
CASES: dict[str, dict[str, Any]] = {
    "nothing beside it": {},
    "the embedded model's": {CONFIG: GENERIC},
    "prefix space": {CONFIG: {"add_prefix_space": True}},
    "prefix space, GPT2Tokenizer": {CONFIG: GPT2 | {"add_prefix_space": True}},
    "prefix space, GPT2TokenizerFast": {CONFIG: {"add_prefix_space": True, "tokenizer_class": "GPT2TokenizerFast"}},
    "prefix space, a class that takes tokenizer.json as it is": {CONFIG: GENERIC | {"add_prefix_space": True}},
    "prefix space in tokenizer.json alone": {CONFIG: GPT2, TOKENIZER: {"pre_tokenizer": PREFIX}},
    "normalizer": {CONFIG: GENERIC, TOKENIZER: {"normalizer": {"type": "Lowercase"}}},
    "normalizer, GPT2Tokenizer": {CONFIG: GPT2, TOKENIZER: {"normalizer": {"type": "Lowercase"}}},
    "truncation": {CONFIG: GPT2, TOKENIZER: {"truncation": TRUNCATION}},
    "added tokens": {CONFIG: GENERIC | {"added_tokens_decoder": ADDED}},
    "added tokens, GPT2Tokenizer": {CONFIG: GPT2 | {"added_tokens_decoder": ADDED}},
    "a special token that another file says is none": {
        CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {"4095": ADDED["4095"] | {"special": False}},
        }
    },
    "a special token of another id": {
        CONFIG: GPT2,
        TOKENIZER: {"added_tokens": [{"id": 4096, **ADDED["4096"]}]},
        "added_tokens.json": {"<x>": 4100},
    },
    "added_tokens.json": {CONFIG: GPT2, "added_tokens.json": {"<x>": 4096, "king": 4097}},
    "special_tokens_map.json": {CONFIG: GPT2, "special_tokens_map.json": MAP},
    "special_tokens_map.json alone": {"special_tokens_map.json": MAP},
    "other special tokens": {CONFIG: GPT2 | {"extra_special_tokens": ["<x>"], "pad_token": "king"}},
    "special tokens as text": {CONFIG: GENERIC | {"split_special_tokens": True}},
    "bos token": {CONFIG: GPT2 | {"add_bos_token": True}},
    "clean-up, which transformers ignores for a BPE": {CONFIG: GPT2 | {"clean_up_tokenization_spaces": True}},
    "CodeGen's": {CONFIG: GENERIC | {"tokenizer_class": "CodeGenTokenizer"}},
    "code of its own, which is not run": {CONFIG: GPT2 | {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}},
}
MakeFolder = Callable[[dict[str, Any]], Path]


@pytest.fixture
def folder_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeFolder:
    """Makes a copy of the embedded tokenizer with these files, or with these changes of tokenizer.json."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(files: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copy(EMBEDDED_MODEL / "config.json", folder)
        tokenizer = json.loads((EMBEDDED_MODEL / TOKENIZER).read_text(encoding="utf-8"))
        for name, value in (files | {TOKENIZER: tokenizer | files.get(TOKENIZER, {})}).items():
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
        return folder

    return make


def assert_equal_to_transformers(folder: Path, served: Path) -> None:
    expected, prompts, detokenizer = (
        AutoTokenizer.from_pretrained(folder),
        PromptTokenizer.load(served),
        Detokenizer.load(served),
    )
    for text in TEXTS:
        ids = expected(text)["input_ids"]
        assert prompts.encode(text) == ids, text
        assert detokenizer.new_bytes(ids).decode(errors="replace") == expected.decode(ids, skip_special_tokens=True)


def test_the_embedded_tokenizer_is_used_as_it_is() -> None:
    assert find_checkpoint(ModelRequest(), EMBEDDED_MODEL, Path("/nowhere")).tokenizer == EMBEDDED_MODEL
    assert_equal_to_transformers(EMBEDDED_MODEL, EMBEDDED_MODEL)


@pytest.mark.parametrize("case", CASES)
def test_encode_and_decode_are_those_of_transformers(case: str, folder_with: MakeFolder) -> None:
    folder = folder_with(CASES[case])
    served = find_checkpoint(ModelRequest(str(folder)), EMBEDDED_MODEL, Path("/nowhere")).tokenizer
    assert_equal_to_transformers(folder, served)
    assert ignored_settings(served) == []


def test_a_relative_cache_is_no_matter_of_where_the_stubs_run(
    folder_with: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = folder_with(CASES["prefix space"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    served = find_checkpoint(ModelRequest(str(folder)), EMBEDDED_MODEL, Path("/nowhere")).tokenizer
    assert served.is_relative_to(tmp_path / "cache")


def test_another_tokenizer_is_merged_with_its_neighbours_too(folder_with: MakeFolder, tmp_path: Path) -> None:
    folder = folder_with(CASES["prefix space"])
    (folder / "config.json").unlink()  # the model's own says the family then
    request = ModelRequest(tokenizer=str(folder))
    served = find_checkpoint(request, EMBEDDED_MODEL, tmp_path / "staging").tokenizer
    assert PromptTokenizer.load(served).encode("king") == PromptTokenizer.load(EMBEDDED_MODEL).encode(" king")


@pytest.mark.parametrize("config", [GENERIC, GPT2, {}], ids=["generic class", "GPT2Tokenizer", "no class"])
def test_a_vocabulary_and_merges_are_gpt2s_whatever_class_stands_beside_them(
    config: dict[str, Any], folder_with: MakeFolder
) -> None:
    folder = folder_with({CONFIG: config})
    model = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))["model"]
    (folder / TOKENIZER).unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    served = find_checkpoint(ModelRequest(str(folder)), EMBEDDED_MODEL, Path("/nowhere")).tokenizer
    prompts, embedded = PromptTokenizer.load(served), PromptTokenizer.load(EMBEDDED_MODEL)
    for text in TEXTS:
        assert prompts.encode(text) == embedded.encode(text), text


@pytest.mark.parametrize("name", [TOKENIZER, CONFIG])
def test_a_broken_file_is_one_line(name: str, folder_with: MakeFolder) -> None:
    folder = folder_with({CONFIG: GPT2})
    (folder / name).write_text("{")
    with pytest.raises(
        ServeError, match=f"--model {folder}: no tokenizer can be made of tokenizer.json, tokenizer_config.json: "
    ):
        find_checkpoint(ModelRequest(str(folder)), EMBEDDED_MODEL, Path("/nowhere"))


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "is not JSON: "), ("[]", "holds no JSON object"), ("{}", "model_type is None, expected")]
)
def test_a_broken_config_is_named_before_anything_is_made_of_it(
    text: str, reason: str, folder_with: MakeFolder
) -> None:
    folder = folder_with({CONFIG: GPT2})
    (folder / "config.json").write_text(text)
    with pytest.raises(ServeError, match=f"--model {folder}: {folder}/config.json:? {reason}"):
        find_checkpoint(ModelRequest(str(folder)), EMBEDDED_MODEL, Path("/nowhere"))
