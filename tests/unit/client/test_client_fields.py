"""The client's options, checks and tensors follow from the table of fields."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptj_triton.client import Client, InvalidFieldError
from gptj_triton.client.command import given_fields, parse_arguments
from gptj_triton.client.request import FIELDS, check, python_type, tensor, tensors
from gptj_triton.fields import BY_NAME

EXAMPLES: dict[type, Any] = {str: "the end", int: 3, float: 0.5, bool: True}


def example(name: str) -> Any:
    value = EXAMPLES[python_type(FIELDS[name])]
    return [value, "é"] if FIELDS[name].many else value


def test_all_fields_can_be_given_but_the_prompt_and_what_the_model_decides() -> None:
    assert set(BY_NAME) - set(FIELDS) == {"text_input", "stream"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_an_option(name: str) -> None:
    option, value = f"--{name.replace('_', '-')}", example(name)
    of_type = python_type(FIELDS[name])
    arguments = {bool: [option], str: [option, "the end", option, "é"]}.get(of_type, [option, str(value)])
    assert given_fields(parse_arguments([*arguments, "Once"])) == {name: value}


def test_the_help_says_what_a_field_does_its_range_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--num-return-sequences INT independent continuations of the prompt; 1 to 64; default: 1" in shown


def test_a_flag_can_be_switched_off() -> None:
    options = parse_arguments(["Once", "--no-exclude-input-in-output"])
    assert given_fields(options) == {"exclude_input_in_output": False}


def test_what_is_not_given_is_not_sent() -> None:
    assert given_fields(parse_arguments(["Once"])) == {}


@pytest.mark.parametrize("name", FIELDS)
def test_a_tensor_has_a_row_for_each_prompt(name: str) -> None:
    field, value = FIELDS[name], example(name)
    array = tensor(name, value, rows=3)
    assert array.shape == (3, len(value) if field.many else 1)
    types = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": bool, "BYTES": object}
    assert array.dtype == types[field.dtype]
    assert [item.decode() if isinstance(item, bytes) else item for item in array[2]] == (
        value if field.many else [value]
    )


def test_prompts_are_the_rows_of_the_first_tensor() -> None:
    made = tensors(["Once", "Éric"], {"max_tokens": 3})
    assert made["text_input"].tolist() == [[b"Once"], ["Éric".encode()]]
    assert made["max_tokens"].tolist() == [[3], [3]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_token": 3}, r"unknown field max_token: .*max_tokens"),
        ({"max_tokens": "3"}, "max_tokens: '3' is not of type int"),
        ({"max_tokens": True}, "max_tokens: True is not of type int"),
        ({"max_tokens": 2**31}, "max_tokens: 2147483648 is outside -2147483648 to 2147483647"),
        ({"seed": -1}, "seed: -1 is outside 0 to 18446744073709551615"),
        ({"temperature": "hot"}, "temperature: 'hot' is not of type float"),
        ({"return_log_probs": 1}, "return_log_probs: 1 is not of type bool"),
        ({"stop_words": "end"}, "stop_words: 'end' is not a list of strings"),
        ({"stop_words": ["end", 3]}, "stop_words: 3 is not of type str"),
        ({"bad_words": ["\udcff"]}, "bad_words: not valid UTF-8 at character 0"),
    ],
)
def test_what_a_type_cannot_carry_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidFieldError, match=words):
        check(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 0, "max_tokens": -(2**31)},
        {"seed": 2**64 - 1, "max_tokens": 2**31 - 1},
        {"temperature": 1, "bad_words": []},
    ],
)
def test_the_ends_of_a_type_are_accepted(fields: dict[str, Any]) -> None:
    check(fields)


def test_generate_takes_no_batches() -> None:
    with Client() as client, pytest.raises(InvalidFieldError, match="http or grpc"):
        client.generate_batch(["Once", "Twice"])


def test_another_protocol_is_refused() -> None:
    with pytest.raises(InvalidFieldError, match="'ftp': give one of generate, http, grpc"):
        Client(protocol="ftp")
