"""What the files beside a tokenizer.json say of it. `transformers` changes the tokenizer by them; this package reads
tokenizer.json alone, and the launcher makes one of all of them (serving/checkpoint.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptj_triton.text.json_files import read_object

NEIGHBOURS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
SPLIT_SPECIAL_TOKENS = "split_special_tokens"
# transformers cleans up the text of a BPE where both are set.
CLEAN_UP = "clean_up_tokenization_spaces"
CLEAN_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
# Keys of tokenizer_config.json that a tokenizer.json has no place for.
SETTINGS = (SPLIT_SPECIAL_TOKENS, CLEAN_UP, CLEAN_UP_BPE)
# The classes for which transformers takes a tokenizer.json as it is, but for tokens that it lacks.
GENERIC_CLASSES = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")


def splits_special_tokens(directory: Path) -> bool:
    """Whether special tokens in a prompt are ordinary text."""
    return bool(_read(directory / "tokenizer_config.json").get(SPLIT_SPECIAL_TOKENS))


def pre_tokenizers(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizers of a tokenizer.json, one or a sequence, in their order."""
    only = tokenizer.get("pre_tokenizer") or {}
    return list(only.get("pretokenizers", [only]))


def ignored_settings(directory: Path) -> list[str]:
    """What the files beside tokenizer.json say otherwise than it, and what has no effect here, a line each."""
    tokenizer = read_object(directory / "tokenizer.json")
    added = {token["content"]: token for token in tokenizer.get("added_tokens", [])}
    config_path = directory / "tokenizer_config.json"
    config = _read(config_path)
    lines = []
    if config.get(CLEAN_UP) and config.get(CLEAN_UP_BPE):
        lines.append(f"{config_path}: {CLEAN_UP_BPE} has no effect: it changes text that a stream has sent already")
    prefix = bool(config.get("add_prefix_space"))
    has_prefix = any(step.get("add_prefix_space") for step in pre_tokenizers(tokenizer))
    if config.get("tokenizer_class") not in GENERIC_CLASSES and prefix != has_prefix:
        lines.append(f"{config_path}: add_prefix_space is {json.dumps(prefix)}")
    for name in NEIGHBOURS:
        for content, facts in _tokens(name, _read(directory / name)):
            if any(added.get(content, {}).get(key) != value for key, value in facts.items()):
                lines.append(f"{directory / name}: the token {content!r} {json.dumps(facts)}")
    return lines


def _tokens(name: str, raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The added tokens that a file names, each with what it says of them."""
    if name == "added_tokens.json":
        yield from ((content, {"id": token_id}) for content, token_id in raw.items())
        return
    for token_id, token in raw.get("added_tokens_decoder", {}).items():
        yield token["content"], {**token, "id": int(token_id)}
    for key, value in raw.items():
        if key.endswith(("_token", "special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                content = token.get("content") if isinstance(token, dict) else token
                if isinstance(content, str):
                    yield content, {"special": True}


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
