"""Settings and `config.json` are refused with a message that names what is wrong and what is allowed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.load import load_engine
from gptj_triton.errors import ConfigError
from gptj_triton.project import EMBEDDED_MODEL

REPOSITORY = Path("/repository")
RAW = {
    "model_type": "gptj",
    "vocab_size": 257,
    "n_positions": 64,
    "n_embd": 96,
    "n_layer": 2,
    "n_head": 3,
    "rotary_dim": 16,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def model_config(directory: Path, **changes: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(RAW | changes))
    return ModelConfig.from_huggingface(directory)


def test_parameters_become_settings_of_their_types() -> None:
    config = EngineConfig.from_parameters(
        {"data_type": "bf16", "kv_cache_gib": "0.5", "step_tokens": "32", "model_checkpoint_path": "/elsewhere"},
        REPOSITORY,
    )
    assert (config.data_type, config.kv_cache_gib, config.step_tokens) == ("bf16", 0.5, 32)
    assert config.checkpoint == Path("/elsewhere")


def test_an_empty_value_means_the_default() -> None:
    names = ["data_type", "kv_cache_gib", "step_tokens", "tensor_para_size", "device", "tokenizer_dir"]
    parameters = {"model_checkpoint_path": "/elsewhere"} | dict.fromkeys(names, "")
    assert EngineConfig.from_parameters(parameters, REPOSITORY) == EngineConfig("/elsewhere")


def test_a_relative_path_starts_at_the_model_repository() -> None:
    parameters = {"model_checkpoint_path": "model/1/weights", "tokenizer_dir": "model/1/tokenizer"}
    config = EngineConfig.from_parameters(parameters, REPOSITORY)
    assert config.checkpoint == REPOSITORY / "model/1/weights"
    assert config.tokenizer == REPOSITORY / "model/1/tokenizer"


@pytest.mark.parametrize("parameters", [{}, {"model_checkpoint_path": ""}])
def test_a_checkpoint_must_be_named(parameters: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="model_checkpoint_path is missing, expected the directory of a checkpoint"):
        EngineConfig.from_parameters(parameters, REPOSITORY)


def test_settings_survive_the_way_to_the_engine_process() -> None:
    config = EngineConfig('/päth with "quotes"', kv_cache_gib=0.25, step_tokens=7)
    assert EngineConfig.from_json(config.to_json()) == config


def test_an_unknown_parameter_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ConfigError, match=r"parameter tensor_paralel_size is unknown, known: .*tensor_para_size"):
        EngineConfig.from_parameters({"tensor_paralel_size": "1"}, REPOSITORY)


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        *(("model_type", spelling, "model_type", "GPT-J") for spelling in ("gpt-j", "gptj", "GPTJ", "GPT_J", "gpt j")),
        *(("data_type", spelling, "data_type", "fp16") for spelling in ("FP16", "float16", "half", "TYPE_FP16")),
        *(("data_type", spelling, "data_type", "bf16") for spelling in ("BF16", "bfloat16")),
        *(("data_type", spelling, "data_type", "fp32") for spelling in ("Float32", "float", " fp32 ")),
        ("is_half", "1", "data_type", "fp16"),
        ("is_half", "0", "data_type", "fp32"),
        ("is_half", "", "data_type", "auto"),
        ("tensor_para_size", " 2 ", "tensor_para_size", 2),
        ("max_seq_len", "528", "max_seq_len", 528),
    ],
)
def test_spellings_of_people_and_of_older_versions_are_understood(
    name: str, value: str, field: str, expected: object
) -> None:
    config = EngineConfig.from_parameters({"model_checkpoint_path": "/w", name: value}, REPOSITORY)
    assert getattr(config, field) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"int8_mode": 1}, "int8_mode is 1"),
        ({"int8_mode": 1, "data_type": "bf16"}, "int8_mode is 1"),
        ({"data_type": "fp8"}, "data_type is 'fp8'"),
        ({"kv_cache_data_type": "fp8"}, "kv_cache_data_type is 'fp8'"),
    ],
)
def test_eight_bits_need_a_gpu(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"parameter {named}, allowed: .* unless there is one GPU"):
        load_engine(EngineConfig(str(EMBEDDED_MODEL), device="cpu", **settings))


@pytest.mark.parametrize("data_type", ["fp32", "fp8"])
def test_int8_weights_are_computed_with_in_sixteen_bits(data_type: str) -> None:
    with pytest.raises(ConfigError, match=f"int8_mode is 1 and data_type '{data_type}', allowed: auto, fp16 or bf16"):
        EngineConfig("/w", int8_mode=1, data_type=data_type)


def test_data_type_comes_before_is_half() -> None:
    parameters = {"model_checkpoint_path": "/w", "is_half": "1", "data_type": "bf16"}
    assert EngineConfig.from_parameters(parameters, REPOSITORY).data_type == "bf16"


def test_parameters_of_older_versions_and_of_others_are_passed_over_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    older = ["head_num", "size_per_head", "inter_size", "vocab_size", "start_id", "end_id", "decoder_layers"]
    older += ["model_name", "rotary_embedding", "top_k", "top_p", "max_input_len", "beam_width", "temperature"]
    older += ["repetition_penalty", "len_penalty", "beam_search_diversity_rate", "is_sparse"]
    triton = ["FORCE_CPU_ONLY_INPUT_TENSORS", "EXECUTION_ENV_PATH", "team"]
    parameters = {"model_checkpoint_path": "/w"} | dict.fromkeys([*older, *triton], "16")
    assert EngineConfig.from_parameters(parameters, REPOSITORY) == EngineConfig("/w")
    [warning] = caplog.messages
    assert all(name in warning for name in [*older, *triton])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_half", "2", "is_half is '2', allowed: 0, 1"),
        ("max_seq_len", "-1", "max_seq_len is -1, allowed: 0 or more"),
        ("context_len", "64", "context_len is unknown, known: "),
        ("checkpoint_path", "/w", "checkpoint_path is unknown, known: "),
        ("tensor_para_size", "0", "tensor_para_size is 0, allowed: 1 or more"),
        ("pipeline_para_size", "0", "pipeline_para_size is 0, allowed: 1"),
        ("data_type", "int4", "data_type is 'int4', allowed: auto, fp32, fp16, bf16, fp8"),
        ("model_type", "GPT-NeoX", "model_type is 'GPT-NeoX', allowed: GPT-J"),
        ("enable_custom_all_reduce", "1", "enable_custom_all_reduce is 1, allowed: 0"),
        ("int8_mode", "2", "int8_mode is 2, allowed: 0, 1"),
        ("device", "tpu", "device is 'tpu', allowed: auto, cpu, cuda"),
        ("kv_cache_gib", "-1", "kv_cache_gib is -1.0, allowed: 0 or more, and finite"),
        ("kv_cache_gib", "nan", "kv_cache_gib is nan, allowed: 0 or more"),
        ("step_tokens", "-1", "step_tokens is -1, allowed: 0 or more"),
        ("context_length", "-1", "context_length is -1, allowed: 0 or more"),
        ("max_sequences", "-2", "max_sequences is -2, allowed: 0 or more"),
        ("max_waiting_requests", "0", "max_waiting_requests is 0, allowed: 1 or more"),
        ("max_waiting_tokens", "-1", "max_waiting_tokens is -1, allowed: 1 or more"),
        ("tensor_para_size", "one", "tensor_para_size is 'one', expected int"),
        ("kv_cache_gib", "1 GiB", "kv_cache_gib is '1 GiB', expected float"),
        ("step_tokens", "2.5", "step_tokens is '2.5', expected int"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"parameter {message}")):
        EngineConfig.from_parameters({"model_checkpoint_path": "/w", name: value}, REPOSITORY)


def test_the_shape_of_a_checkpoint_is_read_from_its_configuration(tmp_path: Path) -> None:
    config = model_config(tmp_path, n_inner=None, layer_norm_epsilon=1e-3, eos_token_id=255)
    assert (config.hidden_size, config.inner_size, config.head_size, config.rotary_dim) == (96, 384, 32, 16)
    assert (config.context_length, config.layer_norm_eps, config.start_id, config.end_ids) == (64, 1e-3, 256, (255,))
    assert model_config(tmp_path, n_inner=100).inner_size == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected 'gptj' or 'codegen'"),
        ({"model_type": ["gptj"]}, "model_type is ['gptj'], expected 'gptj' or 'codegen'"),
        ({"model_type": "codegen"}, "n_head is 3, expected a multiple of 4"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small', expected a number of 0 or more"),
        ({"activation_function": "relu"}, "activation_function is 'relu', expected 'gelu_new'"),
        ({"n_head": 5}, "n_embd 96 is no multiple of n_head 5"),
        ({"rotary_dim": 34}, "rotary_dim is 34, expected an even number <= 32"),
        ({"rotary_dim": 15}, "rotary_dim is 15, expected an even number <= 32"),
    ],
    ids=str,
)
def test_a_configuration_that_no_family_has_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"config.json: {message}")):
        model_config(tmp_path, **changes)


def test_a_null_rotary_dim_turns_the_whole_head_of_a_gptj_and_means_nothing_to_codegen(tmp_path: Path) -> None:
    assert model_config(tmp_path, rotary_dim=None).rotary_dim == 32
    assert model_config(tmp_path, model_type="codegen", n_head=4).rotary_dim == 16
    with pytest.raises(ConfigError, match=r"config\.json has no key 'rotary_dim'"):
        model_config(tmp_path, model_type="codegen", n_head=4, rotary_dim=None)


@pytest.mark.parametrize("model_type", ["gptj", "codegen"])
def test_a_configuration_that_is_written_says_what_was_read(model_type: str, tmp_path: Path) -> None:
    config = model_config(tmp_path, model_type=model_type, n_head=4)
    for end_ids in (config.end_ids, (7, 8), ()):
        written = replace(config, end_ids=end_ids)
        (tmp_path / "config.json").write_text(json.dumps(written.to_huggingface()))
        assert ModelConfig.from_huggingface(tmp_path) == written
    assert config.model_type == AutoConfig.from_pretrained(tmp_path).model_type == model_type


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_a_missing_key_is_refused_by_its_name(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in RAW.items() if name != key}))
    with pytest.raises(ConfigError, match=f"config.json has no key '{key}'"):
        ModelConfig.from_huggingface(tmp_path)


def test_a_model_needs_no_start_token(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"bos_token_id": None}))
    assert ModelConfig.from_huggingface(tmp_path).start_id == 0


def test_a_missing_or_broken_configuration_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'config.json'} cannot be read: No such file")):
        ModelConfig.from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gptj",')
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'config.json'} is not JSON")):
        ModelConfig.from_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("n_embd", "wide"), ("n_layer", None), ("eos_token_id", [1, "2"]), ("n_head", 0)]
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=key):
        model_config(tmp_path, **{key: value})


def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_huggingface(tmp_path)


def test_a_checkpoint_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        ModelConfig.from_huggingface(tmp_path / "model.safetensors")
