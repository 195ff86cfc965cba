"""A user's own config.pbtxt: what it leaves out, and paths that lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gptj_triton.errors import ConfigError
from gptj_triton.triton.model_settings import ModelSettings, read_settings


def read(directory: Path, config: dict[str, Any] | None = None, **parameters: str) -> ModelSettings:
    given = {name: {"string_value": text} for name, text in parameters.items()}
    return read_settings({"parameters": given, **(config or {})}, directory, "1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's directory in a repository, with a checkpoint in its version's directory."""
    checkpoint = tmp_path / "gptj" / "1" / "2-gpu"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").touch()
    return tmp_path / "gptj"


def test_what_is_left_out_has_tritons_defaults(model: Path) -> None:
    settings = read(model, model_checkpoint_path="gptj/1/2-gpu")
    assert (settings.decoupled, settings.engine.checkpoint) == (False, model / "1" / "2-gpu")
    assert read(model, {"model_transaction_policy": {}}, model_checkpoint_path="gptj/1/2-gpu") == settings
    decoupled = {"model_transaction_policy": {"decoupled": True}}
    assert read(model, decoupled, model_checkpoint_path="gptj/1/2-gpu", stream_pieces_per_second="70").pace == 70


def test_a_checkpoint_that_is_not_named_is_looked_for_where_fastertransformer_does(model: Path) -> None:
    assert read(model, tensor_para_size="2").engine.checkpoint == model / "1" / "2-gpu"
    (model / "1" / "2-gpu").rename(model / "1" / "gpt-j-6b")
    config = {"default_model_filename": "gpt-j-6b"}
    assert read(model, config, model_checkpoint_path=" ").engine.checkpoint == model / "1" / "gpt-j-6b"
    message = f"model_checkpoint_path is missing, .* would be {re.escape(str(model))}/1/1-gpu, which does not exist"
    with pytest.raises(ConfigError, match=message):
        read_settings({}, model, "1")


@pytest.mark.parametrize("name", ["model_checkpoint_path", "tokenizer_dir"])
def test_a_path_that_leads_nowhere_is_named_with_its_parameter(name: str, model: Path) -> None:
    parameters = {"model_checkpoint_path": "gptj/1/2-gpu", name: "/no/such"}
    with pytest.raises(ConfigError, match=f"parameter {name}: /no/such does not exist, expected the directory"):
        read(model, None, **parameters)
