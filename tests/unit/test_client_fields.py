"""The client's table of fields: it matches the ensemble, and options, checks and tensors follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from gptj_triton.client import (
    FIELDS,
    MODEL,
    STREAMING_MODEL,
    TEXT_INPUT,
    Client,
    Field,
    InvalidFieldError,
    checked,
    given_fields,
    host_and_port,
    parse_arguments,
    tensor,
)

REPOSITORY = Path(__file__).parents[2] / "model_repository"
EXAMPLES: dict[type, Any] = {str: "the end", int: 3, float: 0.5, bool: True}


def example(field: Field) -> Any:
    value = EXAMPLES[field.python_type]
    return [value, "é"] if field.many else value


@pytest.mark.parametrize("model", [MODEL, STREAMING_MODEL])
def test_fields_are_the_inputs_of_both_ensembles(model: str) -> None:
    config = text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), ModelConfig())
    declared = {each.name: (DataType.Name(each.data_type)[5:], list(each.dims)) for each in config.input}
    del declared["stream"]
    ours = {each.name: (each.datatype.replace("BYTES", "STRING"), [-1 if each.many else 1]) for each in FIELDS}
    assert ours | {TEXT_INPUT.name: ("STRING", [1])} == declared


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_an_option(field: Field) -> None:
    option, value = f"--{field.name.replace('_', '-')}", example(field)
    arguments = {bool: [option], str: [option, "the end", option, "é"]}.get(field.python_type, [option, str(value)])
    assert given_fields(parse_arguments([*arguments, "Once"])) == {field.name: value}


def test_a_flag_can_be_switched_off() -> None:
    options = parse_arguments(["Once", "--no-exclude-input-in-output"])
    assert given_fields(options) == {"exclude_input_in_output": False}


def test_what_is_not_given_is_not_sent() -> None:
    assert given_fields(parse_arguments(["Once"])) == {}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_tensor_has_a_row_for_each_prompt(field: Field) -> None:
    value = example(field)
    array = tensor(field, value, rows=3)
    assert array.shape == (3, len(value) if field.many else 1)
    assert (
        array.dtype
        == {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": bool, "BYTES": object}[field.datatype]
    )
    assert [item.decode() if isinstance(item, bytes) else item for item in array[2]] == (
        value if field.many else [value]
    )


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
        checked(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 0, "max_tokens": -(2**31)},
        {"seed": 2**64 - 1, "max_tokens": 2**31 - 1},
        {"temperature": 1, "bad_words": []},
    ],
)
def test_the_ends_of_a_type_are_accepted(fields: dict[str, Any]) -> None:
    assert {field.name: value for field, value in checked(fields).items()} == fields


def test_a_url_is_host_and_port_with_or_without_http() -> None:
    assert host_and_port("http://localhost:8000/") == host_and_port("localhost:8000") == "localhost:8000"
    with pytest.raises(InvalidFieldError, match="https://localhost"):
        host_and_port("https://localhost")


def test_generate_takes_no_batches() -> None:
    with Client() as client, pytest.raises(InvalidFieldError, match="http or grpc"):
        client.generate_batch(["Once", "Twice"])


def test_another_protocol_is_refused() -> None:
    with pytest.raises(InvalidFieldError, match="'ftp': give one of generate, http, grpc"):
        Client(protocol="ftp")
