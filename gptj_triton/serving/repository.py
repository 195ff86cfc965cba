"""Stages a model repository: the version directories as links, each config.pbtxt rewritten through Triton's protobuf.
Does not know how a server is started, and does not check what a configuration means: Triton and the models do."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from gptj_triton.fields import BY_TENSOR, Origin
from gptj_triton.process.temporary import is_plain
from gptj_triton.serving.checkpoint import Checkpoint
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.installation import write_noted_stub
from gptj_triton.triton.stubs import STUB

BACKEND = "fastertransformer"  # the name of the backend and of the model
ENSEMBLE, STREAMING_ENSEMBLE = "ensemble", "ensemble_stream"
# What this project adds to FasterTransformer's contract; NVIDIA's library knows none of it.
ADDED_INPUTS = frozenset(
    name for name, field in BY_TENSOR.items() if field.tensor is not None and field.tensor.origin is Origin.OURS
)
ADDED_OUTPUTS = frozenset({"finish_reason"})
ADDED_PARAMETERS = ("device", "engine_python", "context_length", "tokenizer_dir")


@dataclass(frozen=True)
class Overrides:
    """What a run sets in the configurations; for `device` and `data_type` see EngineConfig."""

    checkpoint: Checkpoint
    device: str
    data_type: str
    int8_mode: int
    tensor_para_size: int
    engine_python: str
    stream_pieces_per_second: int | None  # None: as committed


def read_config(path: Path) -> Any:
    """The ModelConfig in a config.pbtxt; ServeError names the file and the place that Triton could not read either."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ServeError(f"{path}: {error}") from None


def stage_repository(
    source: Path, target: Path, overrides: Overrides, nvidia_backend: bool, streaming_ensemble: bool = False
) -> list[str]:
    """Writes a copy of the model repository `source` into the directory `target`, with `overrides` applied and, for
    NVIDIA's library, without this project's additions; with `streaming_ensemble`, `ensemble` can stream. `source` is
    not changed. Returns the names of the models that load something: all but ensembles."""
    try:
        os.listdir(source)  # a glob finds nothing where it may not read
    except OSError as error:
        raise ServeError(f"--model-repository {source}: {error.strerror}") from None
    configs = {path.parent: read_config(path) for path in sorted(source.glob("*/config.pbtxt"))}
    if not configs:
        raise ServeError(f"--model-repository {source}: no model with a config.pbtxt in it")
    for folder, config in configs.items():
        if not is_plain(Path(folder.name)):
            raise ServeError(f"{str(folder)!r}: a model's name may have letters, digits and _ . + , @ % = - only")
        apply_overrides(config, overrides)
    if streaming_ensemble:
        make_ensemble_stream(configs)
    if nvidia_backend:
        configs = leave_out_streaming(configs)
        leave_out_additions(configs.values())
    for folder, config in configs.items():
        staged = target / folder.name
        staged.mkdir(parents=True)
        (staged / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
        for entry in folder.iterdir():
            if entry.name == STUB:
                write_noted_stub(staged / STUB, entry.resolve())
            elif entry.name != "config.pbtxt":
                (staged / entry.name).symlink_to(entry.resolve())
    return [folder.name for folder, config in configs.items() if not config.ensemble_scheduling.step]


def apply_overrides(config: Any, overrides: Overrides) -> None:
    """Sets what a run decides: in every model of our backend its parameters, and in every model that has a
    `tokenizer_dir` that one."""
    if "tokenizer_dir" in config.parameters:
        set_parameter(config, "tokenizer_dir", str(overrides.checkpoint.tokenizer))
    if config.backend == BACKEND:
        set_parameter(config, "model_checkpoint_path", str(overrides.checkpoint.weights))
        set_parameter(config, "device", overrides.device)
        set_parameter(config, "data_type", overrides.data_type)
        set_parameter(config, "int8_mode", str(overrides.int8_mode))
        set_parameter(config, "tensor_para_size", str(overrides.tensor_para_size))
        set_parameter(config, "engine_python", overrides.engine_python)
        set_parameter(config, "context_length", str(overrides.checkpoint.context_length or ""))
    if config.model_transaction_policy.decoupled and overrides.stream_pieces_per_second:
        set_parameter(config, "stream_pieces_per_second", str(overrides.stream_pieces_per_second))


def make_ensemble_stream(configs: dict[Path, Any]) -> None:
    """Makes `ensemble` a copy of `ensemble_stream` but for one thing: it answers once unless a request's `stream` is
    true, as TensorRT-LLM's does. ServeError where there is none of either."""
    by_name = {folder.name: config for folder, config in configs.items()}
    for name in (ENSEMBLE, STREAMING_ENSEMBLE):
        if name not in by_name:
            raise ServeError(f"--streaming-ensemble: {next(iter(configs)).parent}: no model {name}")
    ensemble = by_name[ENSEMBLE]
    ensemble.CopyFrom(by_name[STREAMING_ENSEMBLE])
    ensemble.name = ENSEMBLE
    for step in steps_of(ensemble, "preprocessing"):
        step.input_map["stream"] = "stream"
        step.output_map["stream"] = "_stream"
    for step in steps_of(ensemble, f"{BACKEND}_stream"):
        step.input_map["stream"] = "_stream"


def leave_out_streaming(configs: dict[Path, Any]) -> dict[Path, Any]:
    """All configurations but those of models that stream, whose responses this project's steps made for each other."""
    decoupled = {config.name for config in configs.values() if config.model_transaction_policy.decoupled}
    return {
        folder: config
        for folder, config in configs.items()
        if config.name not in decoupled
        and not any(step.model_name in decoupled for step in config.ensemble_scheduling.step)
    }


def set_parameter(config: Any, name: str, value: str) -> None:
    config.parameters[name].string_value = value


def leave_out_additions(configs: Collection[Any]) -> None:
    """Takes from the configurations what NVIDIA's library does not know, and gives it the stop words as token ids,
    which preprocessing makes where an ensemble asks for them."""
    for config in configs:
        if config.backend == BACKEND:
            keep(config.input, lambda tensor: tensor.name not in ADDED_INPUTS)
            keep(config.output, lambda tensor: tensor.name not in ADDED_OUTPUTS)
            for name in ADDED_PARAMETERS:
                config.parameters.pop(name, None)
    for config in configs:
        for step in steps_of(config, BACKEND):
            for name in ADDED_INPUTS:
                step.input_map.pop(name, None)
            step.input_map["stop_words_list"] = "stop_words_list"
            unwritten = [step.output_map.pop(name) for name in ADDED_OUTPUTS if name in step.output_map]
            forget_tensors(config, unwritten)
        for step in steps_of(config, "preprocessing"):
            step.output_map["stop_words_list"] = "stop_words_list"


def steps_of(config: Any, model: str) -> Iterator[Any]:
    return (step for step in config.ensemble_scheduling.step if step.model_name == model)


def forget_tensors(ensemble: Any, tensors: Iterable[str]) -> None:
    """Takes inputs that no step writes any more from the steps which read them."""
    gone = set(tensors)
    for step in ensemble.ensemble_scheduling.step:
        for name in [name for name, tensor in step.input_map.items() if tensor in gone]:
            del step.input_map[name]


def keep(repeated: Any, wanted: Callable[[Any], bool]) -> None:
    """Leaves in a repeated protobuf field the elements that `wanted` says true of."""
    kept = [element for element in repeated if wanted(element)]
    del repeated[:]
    repeated.extend(kept)
