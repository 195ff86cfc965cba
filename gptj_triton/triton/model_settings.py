"""What a model's config.pbtxt says to this backend, whoever wrote it. Knows Triton's JSON of it, not Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.engine.config import EngineConfig
from gptj_triton.errors import ConfigError
from gptj_triton.limits import LIMITS, RequestLimits, read_limits
from gptj_triton.triton.model_parameters import read_model_parameters
from gptj_triton.triton.replies import read_pace


@dataclass(frozen=True)
class ModelSettings:
    """A model that `batches` has a first dimension of rows in all tensors, whatever its config.pbtxt says of them.
    `decoupled` models stream, `pace` pieces a second; `engine` is shared by models with equal settings.
    """

    batches: bool
    decoupled: bool
    pace: float
    limits: RequestLimits
    engine: EngineConfig


def read_settings(model_config: Mapping[str, Any], model_directory: Path, version: str) -> ModelSettings:
    """Read the JSON that Triton makes of a config.pbtxt; what a user's own leaves out has Triton's default.

    A checkpoint that no parameter names is where FasterTransformer's backend looks for it: in the directory of the
    version, by default_model_filename or the name "<tensor_para_size>-gpu". Raises ConfigError naming the parameter.
    """
    parameters = read_model_parameters(model_config)
    decoupled = bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))
    # These are no settings of the engine, which models with equal settings share.
    limits = read_limits(parameters, EngineConfig.__struct_fields__)
    for name in LIMITS:
        parameters.pop(name, None)
    pace = read_pace(parameters.pop("stream_pieces_per_second", "") if decoupled else "")
    if not parameters.get("model_checkpoint_path", "").strip():
        split = f"{parameters.get('tensor_para_size', '').strip() or 1}-gpu"
        default = model_directory / version / (model_config.get("default_model_filename") or split)
        if not default.is_dir():
            raise ConfigError(
                "parameter model_checkpoint_path is missing, expected the directory of a checkpoint; without it, that "
                f"would be {default}, which does not exist"
            )
        parameters["model_checkpoint_path"] = str(default)
    config = EngineConfig.from_parameters(parameters, model_directory.parent)
    for name in ("model_checkpoint_path", "tokenizer_dir"):
        if path := getattr(config, name):
            try:
                find_checkpoint_files(Path(path))
            except ConfigError as error:
                raise ConfigError(f"parameter {name}: {error}") from None
            except UnicodeEncodeError:
                pass  # a stub may know names of ASCII alone; the engine looks again
    batches = int(model_config.get("max_batch_size", 0)) > 0
    return ModelSettings(batches, decoupled, pace, limits, config)
