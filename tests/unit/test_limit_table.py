"""The table of limits: what a parameter may say, and which model keeps what."""

from __future__ import annotations

import pytest

from gptj_triton.engine.config import EngineConfig
from gptj_triton.errors import ConfigError, InvalidRequestError
from gptj_triton.limits import DEFAULTS, EVERYWHERE, LIMITS, RequestLimits, limits_of, parse_limit, read_limits


def test_every_limit_is_kept_somewhere_and_says_what_it_counts() -> None:
    assert {name for model in EVERYWHERE for name in limits_of(model)} == set(LIMITS)
    assert all(field.metadata["meaning"] for field in LIMITS.values())
    assert not set(LIMITS) & set(EngineConfig.__struct_fields__)


def test_parameters_set_limits_and_what_is_empty_or_missing_is_the_default() -> None:
    assert read_limits({}) == read_limits({"max_words": " ", "tokenizer_dir": "x"}) == DEFAULTS
    assert read_limits({"max_words": "7", "max_new_tokens": "0"}) == RequestLimits(max_words=7)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1e3"])
def test_a_value_that_is_no_limit_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=f"parameter max_words is '{text}', allowed: a whole number, 1 or more"):
        read_limits({"max_words": text})


def test_a_limit_misspelt_is_refused_and_other_parameters_are_not() -> None:
    with pytest.raises(ConfigError, match="parameter max_request_token is unknown; max_request_tokens is a limit"):
        read_limits({"max_request_token": "7"})
    read_limits(dict.fromkeys(EngineConfig.__struct_fields__, "7"), EngineConfig.__struct_fields__)
    with pytest.raises(ConfigError, match="no limit is named 'words', allowed: max_request_bytes, "):
        parse_limit("words", "7")


def test_a_value_at_the_limit_is_allowed_and_one_above_it_is_refused_in_words() -> None:
    limits = RequestLimits(max_words=7)
    limits.check("max_words", 7, "number of words")
    limits.check("max_words", 14, "number of words", 2)
    limits.check("max_new_tokens", 10**9, "max_tokens")  # 0 is no limit
    with pytest.raises(InvalidRequestError) as error:
        limits.check("max_words", 8, "number of words")
    assert str(error.value) == "number of words is 8, allowed: 0 to 7 (limit max_words)"
