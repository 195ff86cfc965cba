"""The baseline answers as `ensemble` would, alone or in a batch: the comparison is of like with like."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gptj_triton.bench.baseline_server import GenerateRequest, Model
from gptj_triton.project import EMBEDDED_MODEL

PROMPTS = ["Once upon a time", "The wolf knocked at the door and cried, and the youngest of the seven kids", "A king"]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(EMBEDDED_MODEL, "cpu", "fp32")


def request(text: str = "Once upon a time", **fields: Any) -> GenerateRequest:
    return GenerateRequest(text_input=text, **fields)


@pytest.mark.parametrize(
    "fields", [{"text_input": ""}, {"max_tokens": 0}, {"top_p": 1.1}, {"max_token": 8}, {"temperature": -1}]
)
def test_what_cannot_be_served_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest(**{"text_input": "Once", **fields})


@pytest.mark.parametrize(
    ("fields", "samples"),
    [({}, False), ({"top_k": 4}, True), ({"temperature": 1.0}, True), ({"temperature": 0, "top_k": 4}, False)],
)
def test_sampling_is_asked_for_as_ensemble_has_it(fields: dict[str, Any], samples: bool) -> None:
    assert request(**fields).generate_arguments()["do_sample"] is samples


def test_rows_of_a_batch_have_the_text_that_they_have_alone(model: Model) -> None:
    requests = [request(text, max_tokens=6, min_tokens=6) for text in PROMPTS]
    assert model.generate(requests) == [text for each in requests for text in model.generate([each])]


def test_a_seed_decides_what_is_drawn(model: Model) -> None:
    first, again, other = (model.generate([request(max_tokens=6, temperature=1.5, seed=seed)]) for seed in (7, 7, 8))
    assert first == again != other


def test_only_equal_parameters_share_a_batch() -> None:
    assert request("a", max_tokens=8).may_join(request("b", max_tokens=8))
    assert not request("a", max_tokens=8).may_join(request("a", max_tokens=9))
