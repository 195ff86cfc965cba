"""Which tokens end a text, read from a checkpoint's files as `transformers` reads them. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptj_triton.errors import ConfigError
from gptj_triton.text.json_files import read_object

GENERATION_CONFIG = "generation_config.json"
KEY = "eos_token_id"


def read_end_ids(path: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The end ids of a checkpoint in their order, none or more; `config` is what the file `path`, config.json, holds.

    A generation_config.json beside it counts alone, even if it names none (transformers, GenerationMixin). Raises
    ConfigError naming the file, the key and what was found.
    """
    generation_config = path.with_name(GENERATION_CONFIG)
    if generation_config.is_file():
        path = generation_config
        config = read_object(path)
    return check_end_ids(config.get(KEY), vocab_size, f"{path}: {KEY}")


def fill_id(end_ids: Sequence[int]) -> int:
    """What FasterTransformer's one `end_id` says of them: the first, 0 where there is none. It also stands behind a
    sequence where a tensor has room for more.
    """
    return end_ids[0] if end_ids else 0


def check_end_ids(value: object, vocab_size: int, name: str) -> tuple[int, ...]:
    """The end ids of a `value` from a file: a number, a sequence of them or None; ConfigError begins with `name`.

    Ids outside the vocabulary never come, so they are left out: some models say -1 for none.
    """
    listed = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(type(token) is int for token in listed):
        raise ConfigError(f"{name} is {value!r}, expected a whole number, a list of them, or null")
    return tuple(dict.fromkeys(token for token in listed if 0 <= token < vocab_size))
