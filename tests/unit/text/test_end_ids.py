"""Which tokens end a text: the file, the value and the ids are those that `transformers` goes by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gptj_triton.errors import ConfigError
from gptj_triton.text.end_ids import read_end_ids

ABSENT = "absent"


def end_ids(folder: Path, in_config: Any, in_generation_config: Any = None) -> tuple[int, ...]:
    """What is read where config.json has one value and generation_config.json, unless it is None, has another."""
    if in_generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(in_generation_config))
    return read_end_ids(folder / "config.json", {} if in_config == ABSENT else {"eos_token_id": in_config}, 100)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, (7,)),
        (0, (0,)),
        ([7], (7,)),
        ([9, 0, 7], (9, 0, 7)),
        ([7, 7, 9], (7, 9)),
        (None, ()),
        ([], ()),
        (ABSENT, ()),
        (-1, ()),
        ([7, -1], (7,)),
        (100, ()),
        ([99, 100], (99,)),
    ],
    ids=str,
)
def test_a_number_a_list_or_nothing_is_read_without_ids_that_never_come(
    value: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert end_ids(tmp_path, value) == expected
    raw = {} if value == ABSENT else {"eos_token_id": value}
    assert end_ids(tmp_path, 50, raw) == expected


def test_the_generation_config_counts_alone(tmp_path: Path) -> None:
    assert end_ids(tmp_path, [1, 2], {"eos_token_id": 3}) == (3,)
    assert end_ids(tmp_path, 1, {"bos_token_id": 3}) == ()


@pytest.mark.parametrize("value", ["7", 7.5, True, [7, "9"], [[7]], {"id": 7}], ids=str)
def test_anything_else_is_refused_by_file_and_key(value: Any, tmp_path: Path) -> None:
    found = f"eos_token_id is {value!r}, expected a whole number, a list of them, or null"
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/config.json: {found}")):
        end_ids(tmp_path, value)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/generation_config.json: {found}")):
        end_ids(tmp_path, 1, {"eos_token_id": value})


def test_a_generation_config_that_is_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json holds no JSON object"):
        end_ids(tmp_path, 1, [])
