"""Every field of a request is checked, and refused in words a user can act on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tritonclient.utils import triton_to_np_dtype

from gptj_triton.fields import BY_NAME
from gptj_triton.triton.request_fields import (
    FieldError,
    PromptLimits,
    RowFields,
    check_tokens,
    new_token_limit,
    read_fields,
)

LIMITS = PromptLimits(context_length=64, vocab_size=300, longest_token=10)
DTYPES = {name: triton_to_np_dtype(field.dtype) for name, field in BY_NAME.items()}
NUMBERS = [name for name, field in BY_NAME.items() if field.minimum is not None]


def arrays(**fields: Any) -> dict[str, Any]:
    """Fields of one row (or, as lists, of several) as the tensors that Triton hands over."""
    made = {}
    for name, value in {"text_input": b"Once upon a time", **fields}.items():
        if value is None:
            continue
        rows = value if isinstance(value, list) else [value]
        made[name] = np.array([row if isinstance(row, (list, tuple)) else [row] for row in rows], dtype=DTYPES[name])
    return made


def only_row(**fields: Any) -> RowFields:
    (row,) = read_fields(arrays(**fields), LIMITS)
    return row


def test_a_prompt_with_a_token_that_the_model_lacks_is_refused() -> None:
    check_tokens([0, 299], LIMITS)
    check_tokens([], LIMITS)
    with pytest.raises(
        FieldError, match=r"^text_input has the token 300; it must have only tokens of .*, from 0 to 299"
    ):
        check_tokens([4, 300, 5], LIMITS)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text_input", b"", "text_input is empty; it must have at least one character"),
        ("text_input", b"a\xffb", "text_input has the byte 0xff at position 1; it must be valid UTF-8"),
        ("text_input", b"cut \xe2\x82", "text_input has the byte 0xe2 at position 4; it must be valid UTF-8"),
        ("max_tokens", 0, "max_tokens is 0; it must be a whole number, 1 or more"),
        ("max_tokens", -3, "max_tokens is -3; it must be a whole number, 1 or more"),
        ("max_tokens", -(2**31), "max_tokens is -2147483648; it must be a whole number, 1 or more"),
        ("min_tokens", -1, "min_tokens is -1; it must be a whole number, 0 or more"),
        ("temperature", -0.5, "temperature is -0.5; it must be a finite number, 0 or more"),
        ("top_k", -1, "top_k is -1; it must be a whole number, 0 or more"),
        ("top_p", -0.1, "top_p is -0.1; it must be a finite number from 0 to 1"),
        ("top_p", 1.5, "top_p is 1.5; it must be a finite number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty is 0; it must be a finite number from 0.001 to 1000"),
        ("beam_width", 0, "beam_width is 0; it must be a whole number from 1 to 64"),
        ("beam_width", 65, "beam_width is 65; it must be a whole number from 1 to 64"),
        ("num_return_sequences", 0, "num_return_sequences is 0; it must be a whole number from 1 to 64"),
        ("num_return_sequences", 65, "num_return_sequences is 65; it must be a whole number from 1 to 64"),
        ("end_id", -1, "end_id is -1; it must be a whole number, 0 or more"),
        ("end_id", 300, "end_id is 300; it must be a token of the vocabulary, from 0 to 299"),
        ("pad_id", 300, "pad_id is 300; it must be a token of the vocabulary, from 0 to 299"),
        (
            "stream",
            True,
            "stream is true; it must be false, because `ensemble` answers once: use `ensemble_stream`, or have the "
            "server started with --streaming-ensemble",
        ),
        ("stop_words", [(b"\xc3",)], "stop_words[0] has the byte 0xc3 at position 0; it must be valid UTF-8"),
        (
            "stop_words",
            [(b"a",) * 1025],
            "number of words of stop_words is 1025, allowed: 0 to 1024 (limit max_words)",
        ),
        (
            "bad_words",
            [(b"a" * 65537,)],
            "number of bytes of bad_words is 65537, allowed: 0 to 65536 (limit max_word_bytes)",
        ),
    ],
)
def test_a_bad_value_is_refused_by_field_value_and_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(FieldError) as error:
        read_fields(arrays(**{field: value}), LIMITS)
    assert str(error.value) == message


@pytest.mark.parametrize("field", [name for name, field in BY_NAME.items() if field.dtype == "FP32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_float_field_takes_nan_or_infinity(field: str, value: float) -> None:
    with pytest.raises(FieldError, match=rf"^{field} is -?(nan|inf); it must be a finite number"):
        read_fields(arrays(**{field: value}), LIMITS)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_every_range_are_allowed(name: str) -> None:
    field = BY_NAME[name]
    read_fields(arrays(**{name: field.minimum}), LIMITS)
    if field.maximum is not None:
        read_fields(arrays(**{name: field.maximum}), LIMITS)


@pytest.mark.parametrize("name", NUMBERS)
def test_beyond_the_ends_of_every_range_a_value_is_refused(name: str) -> None:
    field = BY_NAME[name]
    assert field.minimum is not None
    beyond = [field.minimum - 1] if field.maximum is None else [field.minimum - 1, field.maximum + 1]
    for value in beyond:
        with pytest.raises(FieldError, match=f"^{name} is .*; it must be {field.kind}"):
            read_fields(arrays(**{name: value}), LIMITS)


def test_a_missing_text_input_is_refused() -> None:
    message = "text_input is missing; it must be a prompt of at least one character"
    with pytest.raises(FieldError, match=f"^{message}$"):
        read_fields(arrays(text_input=None, max_tokens=3), LIMITS)
    with pytest.raises(FieldError, match=rf"^{message} \(unknown fields 'question', 'team'\)$"):
        read_fields({}, LIMITS, ["'question'", "'team'"])
    with pytest.raises(FieldError) as error:
        read_fields({}, LIMITS, [repr("x" * 60)] * 1000)
    assert len(str(error.value)) < 700


def test_rows_must_be_there_and_equally_many_in_all_fields() -> None:
    with pytest.raises(FieldError, match="text_input has no rows; it must have one or more"):
        read_fields({"text_input": np.empty((0, 1), object)}, LIMITS)
    with pytest.raises(FieldError, match="max_tokens has 3 rows; it must have 2, as text_input has"):
        read_fields(arrays(text_input=[b"a", b"b"], max_tokens=[1, 2, 3]), LIMITS)


def test_a_prompt_of_too_many_bytes_is_refused_before_it_is_tokenised() -> None:
    assert only_row(text_input=b"a" * 630)
    with pytest.raises(
        FieldError, match="text_input is 631 bytes long; it must be at most 630, because the context holds 64"
    ):
        only_row(text_input=b"a" * 631)


def test_where_the_longest_token_is_unknown_no_prompt_is_refused_by_its_bytes() -> None:
    assert read_fields(
        arrays(text_input=b"a" * 100_000), PromptLimits(context_length=64, vocab_size=300, longest_token=None)
    )


def test_seed_and_random_seed_are_one_field() -> None:
    assert only_row(seed=2**64 - 1).seed == 2**64 - 1
    assert only_row(random_seed=7).seed == 7
    assert only_row(seed=7, random_seed=7).seed == 7
    assert only_row(seed=0).seed == only_row(random_seed=0).seed == 0
    assert only_row().seed is None
    with pytest.raises(FieldError, match="seed is 7 and random_seed, its other name, is 8; they must be equal"):
        only_row(seed=7, random_seed=8)


@pytest.mark.parametrize(
    ("fields", "runtime"),
    [
        ({}, (0, 0.0)),
        ({"seed": 1}, (0, 0.0)),
        ({"temperature": 0}, (0, 0.0)),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5}, (0, 0.0)),
        ({"temperature": 0.5}, (0, 1.0)),
        ({"temperature": 0.5, "top_k": 0}, (0, 1.0)),
        ({"temperature": 0.5, "top_k": 5}, (5, 0.0)),
        ({"temperature": 0.5, "top_p": 0}, (0, 0.0)),
        ({"temperature": 0.5, "top_p": 0.5}, (0, 0.5)),
        ({"top_k": 5}, (5, 0.0)),
        ({"top_k": 0}, (0, 0.0)),
        ({"top_k": 5, "top_p": 0.5}, (5, 0.5)),
    ],
)
def test_temperature_zero_is_greedy_and_a_temperature_alone_samples_from_all(fields: Any, runtime: Any) -> None:
    assert only_row(**fields).sampling == runtime


def test_absent_fields_have_their_defaults() -> None:
    row = only_row()
    assert (row.max_tokens, row.min_tokens, row.beam_width, row.num_return_sequences) == (None, 0, 1, 1)
    assert (row.bad_words, row.stop_words, row.end_id, row.temperature) == ((), (), None, None)


@pytest.mark.parametrize("name", ["stop_words", "bad_words"])
def test_empty_words_mean_nothing(name: str) -> None:
    for words in ((), (b"",), (b"", b""), (b"",) * 1024):
        assert getattr(only_row(**{name: [words]}), name) == ()
    assert getattr(only_row(**{name: [(b"", b"a", b"", b" ")]}), name) == ("a", " ")
    with pytest.raises(FieldError, match=rf"{name}\[1\] has the byte 0xc3"):
        only_row(**{name: [(b"", b"\xc3")]})


def test_rows_keep_their_own_values() -> None:
    rows = read_fields(
        arrays(text_input=[b"a", b"b"], max_tokens=[3, 4], stop_words=[(b"x", b"y"), (b"z", b"z")]), LIMITS
    )
    assert [(row.text_input, row.max_tokens, row.stop_words) for row in rows] == [
        ("a", 3, ("x", "y")),
        ("b", 4, ("z", "z")),
    ]


def test_an_error_names_its_row_when_there_are_several() -> None:
    with pytest.raises(FieldError, match=r"^row 2: max_tokens is 0;"):
        read_fields(arrays(text_input=[b"a", b"b", b"c"], max_tokens=[3, 4, 0]), LIMITS)
    with pytest.raises(FieldError, match=r"^max_tokens is 0;"):
        read_fields(arrays(text_input=[b"a"], max_tokens=[0]), LIMITS)


@pytest.mark.parametrize("field", ["beam_width", "num_return_sequences"])
def test_rows_must_agree_on_the_number_of_sequences(field: str) -> None:
    with pytest.raises(FieldError, match=f"row 1: {field} is 3; it must be 2, as in row 0, in all rows of a request"):
        read_fields(arrays(text_input=[b"a", b"b"], **{field: [2, 3]}), LIMITS)


def test_max_tokens_may_fill_the_context_and_not_one_more() -> None:
    assert new_token_limit(only_row(max_tokens=60), 4, LIMITS) == 60
    with pytest.raises(FieldError) as error:
        new_token_limit(only_row(max_tokens=61), 4, LIMITS)
    assert str(error.value) == (
        "max_tokens is 61; it must be from 1 to 60, because text_input is 4 tokens long and the context holds 64 "
        "tokens, prompt and new text together"
    )


def test_an_absent_max_tokens_is_sixteen_or_what_the_context_has_left() -> None:
    assert new_token_limit(only_row(), 4, LIMITS) == 16
    assert new_token_limit(only_row(), 60, LIMITS) == 4
    assert new_token_limit(only_row(min_tokens=20), 4, LIMITS) == 20


@pytest.mark.parametrize("length", [0, 64, 1000])
def test_a_prompt_must_leave_room_for_a_new_token(length: int) -> None:
    message = f"text_input is {length} tokens long; it must be from 1 to 63, because the context holds 64 tokens"
    with pytest.raises(FieldError, match=message):
        new_token_limit(only_row(), length, LIMITS)


def test_min_tokens_must_not_exceed_max_tokens() -> None:
    assert new_token_limit(only_row(min_tokens=5, max_tokens=5), 4, LIMITS) == 5
    with pytest.raises(FieldError, match="min_tokens is 6; it must be from 0 to max_tokens, here 5"):
        new_token_limit(only_row(min_tokens=6, max_tokens=5), 4, LIMITS)


def test_min_length_is_min_tokens_and_an_error_has_the_name_that_was_given() -> None:
    assert only_row(min_length=3).min_tokens == only_row(min_length=3, min_tokens=3).min_tokens == 3
    with pytest.raises(FieldError, match="min_tokens is 2 and min_length, its other name, is 3; they must be equal"):
        only_row(min_length=3, min_tokens=2)
    with pytest.raises(FieldError, match=r"^min_length is 6; it must be from 0 to max_tokens, here 5"):
        new_token_limit(only_row(min_length=6, max_tokens=5), 4, LIMITS)
