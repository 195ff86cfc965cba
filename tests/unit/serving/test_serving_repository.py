"""Staging the committed model repository: overrides, and compatibility with NVIDIA's library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc.model_config_pb2 import DataType

from gptj_triton.project import PROJECT
from gptj_triton.serving.checkpoint import Checkpoint
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.repository import Overrides, read_config, stage_repository

REPOSITORY = PROJECT / "model_repository"
OVERRIDES = Overrides(Checkpoint(Path("/w"), Path("/t"), 48), "cuda", "bf16", 1, 2, "/opt/python", 70, {"max_words": 7})

# What NVIDIA's library takes and gives for GPT-J (fastertransformer_backend, all_models/gptj, and its GptJTritonModel).
NVIDIA_INPUTS = {
    **dict.fromkeys(["input_ids", "request_output_len"], "TYPE_UINT32 [-1]"),
    "input_lengths": "TYPE_UINT32 [1] reshaped to []",
    **dict.fromkeys(
        ["start_id", "end_id", "runtime_top_k", "beam_width", "prompt_learning_task_name_ids", "top_p_reset_ids"]
        + ["min_length"],
        "TYPE_UINT32 [1] reshaped to [] optional",
    ),
    **dict.fromkeys(
        ["runtime_top_p", "beam_search_diversity_rate", "temperature", "len_penalty", "repetition_penalty"]
        + ["top_p_decay", "top_p_min", "presence_penalty"],
        "TYPE_FP32 [1] reshaped to [] optional",
    ),
    "random_seed": "TYPE_UINT64 [1] reshaped to [] optional",
    "is_return_log_probs": "TYPE_BOOL [1] reshaped to [] optional",
    **dict.fromkeys(["bad_words_list", "stop_words_list"], "TYPE_INT32 [2, -1] optional"),
}
NVIDIA_OUTPUTS = {
    "output_ids": "TYPE_UINT32 [-1, -1]",
    "sequence_length": "TYPE_UINT32 [-1]",
    "cum_log_probs": "TYPE_FP32 [-1]",
    "output_log_probs": "TYPE_FP32 [-1, -1]",
}
NVIDIA_PARAMETERS = {
    *("tensor_para_size", "pipeline_para_size", "data_type", "model_type", "model_checkpoint_path"),
    *("enable_custom_all_reduce", "int8_mode"),
}


def describe(tensor: Any, is_input: bool = False) -> str:
    shape = f" reshaped to {list(tensor.reshape.shape)}" if tensor.HasField("reshape") else ""
    optional = " optional" if is_input and tensor.optional else ""
    return f"{DataType.Name(tensor.data_type)} {list(tensor.dims)}{shape}{optional}"


def stage(folder: Path, nvidia_backend: bool) -> dict[str, Any]:
    stage_repository(REPOSITORY, folder, OVERRIDES, nvidia_backend)
    return {path.parent.name: read_config(path) for path in folder.glob("*/config.pbtxt")}


def parameters_of(config: Any) -> dict[str, str]:
    return {name: value.string_value for name, value in config.parameters.items()}


def check_wiring(configs: dict[str, Any], name: str = "ensemble") -> None:
    """Every step is given all that it needs, under names that it has, from tensors that something writes."""
    ensemble = configs[name]
    steps = list(ensemble.ensemble_scheduling.step)
    written = {tensor.name for tensor in ensemble.input}
    for step in steps:
        model = configs[step.model_name]
        inputs = {tensor.name: tensor for tensor in model.input}
        assert set(step.input_map) <= set(inputs)
        assert {name for name, tensor in inputs.items() if not tensor.optional} <= set(step.input_map)
        assert set(step.output_map) <= {tensor.name for tensor in model.output}
        written |= set(step.output_map.values())
    read = {tensor for step in steps for tensor in step.input_map.values()}
    assert read | {tensor.name for tensor in ensemble.output} <= written


def test_overrides_reach_the_models_they_are_for(tmp_path: Path) -> None:
    configs = stage(tmp_path, nvidia_backend=False)
    expected = {
        "model_checkpoint_path": "/w",
        "device": "cuda",
        "data_type": "bf16",
        "int8_mode": "1",
        "tensor_para_size": "2",
        "engine_python": "/opt/python",
        "context_length": "48",
        "tokenizer_dir": "/t",
    }
    for model in ("fastertransformer", "fastertransformer_stream"):
        assert expected.items() <= parameters_of(configs[model]).items()
    assert parameters_of(configs["fastertransformer_stream"])["stream_pieces_per_second"] == "70"
    assert parameters_of(configs["preprocessing"])["tokenizer_dir"] == "/t"
    assert parameters_of(configs["postprocessing"])["tokenizer_dir"] == "/t"


def test_all_but_the_overrides_is_as_committed(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in REPOSITORY.glob("*/config.pbtxt")}
    for name, config in stage(tmp_path, nvidia_backend=False).items():
        committed = read_config(REPOSITORY / name / "config.pbtxt")
        assert set(config.parameters) == set(committed.parameters)
        config.ClearField("parameters")
        committed.ClearField("parameters")
        assert config == committed
        assert (tmp_path / name / "1").samefile(REPOSITORY / name / "1")
    assert {path: path.read_bytes() for path in REPOSITORY.glob("*/config.pbtxt")} == before


@pytest.mark.parametrize("ensemble", ["ensemble", "ensemble_stream"])
def test_the_committed_ensembles_are_wired_through(ensemble: str, tmp_path: Path) -> None:
    check_wiring(stage(tmp_path, nvidia_backend=False), ensemble)


def test_an_ensemble_that_can_stream_is_the_streaming_one_but_for_its_own_stream(tmp_path: Path) -> None:
    stage_repository(REPOSITORY, tmp_path, OVERRIDES, nvidia_backend=False, streaming_ensemble=True)
    configs = {path.parent.name: read_config(path) for path in tmp_path.glob("*/config.pbtxt")}
    check_wiring(configs)
    ensemble, stream = configs["ensemble"], configs["ensemble_stream"]
    assert stream == read_config(REPOSITORY / "ensemble_stream" / "config.pbtxt")
    before, frontend, _ = ensemble.ensemble_scheduling.step
    assert before.input_map.pop("stream") == "stream"
    assert frontend.input_map["stream"] == before.output_map.pop("stream") == "_stream"
    frontend.input_map["stream"], ensemble.name = "stream", "ensemble_stream"
    assert ensemble == stream


@pytest.mark.parametrize("missing", ["ensemble", "ensemble_stream"])
def test_a_repository_without_both_ensembles_has_none_that_can_stream(tmp_path: Path, missing: str) -> None:
    for name in {"ensemble", "ensemble_stream"} - {missing}:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text(f'name: "{name}"\n')
    with pytest.raises(ServeError, match=f"--streaming-ensemble: .*: no model {missing}"):
        stage_repository(tmp_path, tmp_path / "staged", OVERRIDES, nvidia_backend=False, streaming_ensemble=True)


def test_models_that_share_an_engine_differ_in_what_is_theirs_alone() -> None:
    whole, stream = (
        parameters_of(read_config(REPOSITORY / model / "config.pbtxt"))
        for model in ("fastertransformer", "fastertransformer_stream")
    )
    assert stream.pop("stream_pieces_per_second")
    assert stream == whole


def test_nvidias_library_is_not_asked_to_stream(tmp_path: Path) -> None:
    served = {"preprocessing", "fastertransformer", "postprocessing", "ensemble"}
    assert set(stage(tmp_path, nvidia_backend=True)) == served


def test_the_committed_model_has_all_that_nvidias_has(tmp_path: Path) -> None:
    model = stage(tmp_path, nvidia_backend=False)["fastertransformer"]
    assert NVIDIA_INPUTS.items() <= {tensor.name: describe(tensor, is_input=True) for tensor in model.input}.items()
    assert NVIDIA_OUTPUTS.items() <= {tensor.name: describe(tensor) for tensor in model.output}.items()
    assert set(model.parameters) >= NVIDIA_PARAMETERS


def test_nvidias_library_is_asked_for_nothing_that_it_does_not_know(tmp_path: Path) -> None:
    model = stage(tmp_path, nvidia_backend=True)["fastertransformer"]
    assert {tensor.name: describe(tensor, is_input=True) for tensor in model.input} == NVIDIA_INPUTS
    assert {tensor.name: describe(tensor) for tensor in model.output} == NVIDIA_OUTPUTS
    assert set(model.parameters) == NVIDIA_PARAMETERS


def test_nvidias_ensemble_is_wired_through_and_stops_at_token_ids(tmp_path: Path) -> None:
    configs = stage(tmp_path, nvidia_backend=True)
    check_wiring(configs)
    steps = {step.model_name: step for step in configs["ensemble"].ensemble_scheduling.step}
    written = steps["preprocessing"].output_map["stop_words_list"]
    assert written == steps["fastertransformer"].input_map["stop_words_list"]


def test_a_user_sees_the_same_ensemble_on_nvidias_library(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, nvidias = stage(tmp_path / "a", nvidia_backend=False), stage(tmp_path / "b", nvidia_backend=True)
    assert list(ours["ensemble"].input) == list(nvidias["ensemble"].input)
    assert list(ours["ensemble"].output) == list(nvidias["ensemble"].output)


def test_a_broken_config_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = tmp_path / "model" / "config.pbtxt"
    config.write_text('name: "model"\nmax_batch: 3\n')
    with pytest.raises(ServeError, match=r"config\.pbtxt: 2:1 : .*max_batch"):
        stage_repository(tmp_path, tmp_path / "staged", OVERRIDES, nvidia_backend=False)


def test_a_repository_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"no model with a config\.pbtxt"):
        stage_repository(tmp_path, tmp_path / "staged", OVERRIDES, nvidia_backend=False)


@pytest.mark.parametrize(("name", "reason"), [("gone", "No such file or directory"), ("file", "Not a directory")])
def test_a_repository_that_is_no_directory_is_called_that(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServeError, match=f"--model-repository {tmp_path / name}: {reason}"):
        stage_repository(tmp_path / name, tmp_path / "staged", OVERRIDES, nvidia_backend=False)
