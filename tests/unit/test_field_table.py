"""The table of request fields agrees with all that cannot be made from it, and says what it means in words."""

from __future__ import annotations

import math

import msgspec
import pytest

from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.fields import BY_NAME, BY_TENSOR, FIELDS, Field
from gptj_triton.project import PROJECT
from gptj_triton.triton.reference import with_tables


def test_every_name_and_every_tensor_is_there_once() -> None:
    assert len(BY_NAME) == sum(field.name is not None for field in FIELDS)
    assert len(BY_TENSOR) == sum(field.tensor is not None for field in FIELDS)
    assert all(field.name or field.tensor for field in FIELDS)


def test_every_parameter_of_the_engine_has_a_tensor_of_its_name_and_its_default() -> None:
    parameters = {each.name: each.default for each in msgspec.structs.fields(SamplingParams)}
    assert set(parameters) <= set(BY_TENSOR)
    constant = {name: BY_TENSOR[name].default for name in parameters if parameters[name] is not msgspec.NODEFAULT}
    del constant["random_seed"]  # 0 for FasterTransformer; the ensemble draws one
    assert constant == {name: parameters[name] for name in constant}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name or field.tensor.name)
def test_a_default_is_in_the_range_or_said_in_words(field: Field) -> None:
    assert field.default is not None or field.default_words
    if field.minimum is not None and field.default is not None:
        assert field.allows(field.default)


def test_a_range_has_its_ends_and_nothing_beyond_them() -> None:
    share = Field(name="share", dtype="FP32", help="", minimum=0, maximum=1)
    assert [share.allows(value) for value in (0.0, 1.0, -1e-9, 1.000001)] == [True, True, False, False]
    assert [share.allows(value) for value in (math.nan, math.inf, -math.inf)] == [False, False, False]
    above = Field(name="above", dtype="FP32", help="", minimum=0, maximum=1, above_minimum=True)
    assert [above.allows(value) for value in (0.0, 1e-9, 1.0)] == [False, True, True]
    count = Field(name="count", dtype="INT32", help="", minimum=1)
    assert [count.allows(value, most=7) for value in (0, 1, 7, 8)] == [False, True, True, False]
    anything = Field(name="seed", dtype="UINT64", help="")
    assert anything.allows(2**64 - 1)


def test_a_range_is_said_in_words() -> None:
    share = Field(name="share", dtype="FP32", help="", minimum=0, maximum=1)
    assert (share.range(), share.range(most=0.5)) == ("0 to 1", "0 to 0.5")
    assert Field(name="above", dtype="FP32", help="", minimum=0, maximum=1, above_minimum=True).range() == (
        "more than 0, at most 1"
    )
    count = Field(name="count", dtype="INT32", help="", minimum=1)
    assert (count.range(), count.range(most=7)) == ("1 or more", "1 to 7")
    assert Field(name="seed", dtype="UINT64", help="").range() == ""


def test_the_reference_has_the_tables_of_today() -> None:
    reference = (PROJECT / "docs" / "reference.md").read_text()
    assert with_tables(reference) == reference
