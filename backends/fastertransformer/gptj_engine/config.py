"""The shape of a GPT-J checkpoint and the settings of an engine, each read once and frozen. Knows no tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gptj_engine.errors import ConfigError

DATA_TYPES = ("auto", "fp32", "fp16", "bf16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class ModelConfig:
    """What a GPT-J checkpoint says of itself; lengths count tokens."""

    vocab_size: int
    context_length: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    rotary_dim: int
    layer_norm_eps: float
    start_id: int
    end_id: int

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_huggingface(cls, checkpoint: Path) -> ModelConfig:
        """Read `config.json` of a Hugging Face GPT-J directory.

        Raises ConfigError naming the file, the key and what was found.
        """
        path = checkpoint / "config.json"
        raw = _read_object(path)
        if raw.get("model_type") != "gptj":
            raise ConfigError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'gptj'")
        if raw.get("activation_function", "gelu_new") != "gelu_new":
            raise ConfigError(f"{path}: activation_function is {raw['activation_function']!r}, expected 'gelu_new'")

        def whole(key: str, least: int, default: int | None = None) -> int:
            value = default if raw.get(key) is None else raw[key]
            if value is None:
                raise ConfigError(f"{path} has no key {key!r}")
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{path}: {key} is {raw.get(key)!r}, expected a whole number of {least} or more")
            return value

        hidden_size, num_heads = whole("n_embd", 1), whole("n_head", 1)
        config = cls(
            vocab_size=whole("vocab_size", 1),
            context_length=whole("n_positions", 2),
            hidden_size=hidden_size,
            inner_size=whole("n_inner", 1, default=4 * hidden_size),
            num_layers=whole("n_layer", 1),
            num_heads=num_heads,
            rotary_dim=whole("rotary_dim", 2, default=hidden_size // num_heads),
            layer_norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
            start_id=whole("bos_token_id", 0),
            end_id=whole("eos_token_id", 0),
        )
        if config.hidden_size % config.num_heads:
            raise ConfigError(f"{path}: n_embd {config.hidden_size} is no multiple of n_head {config.num_heads}")
        if config.rotary_dim % 2 or config.rotary_dim > config.head_size:
            raise ConfigError(
                f"{path}: rotary_dim is {config.rotary_dim}, expected an even number <= {config.head_size}"
            )
        return config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; a GPT-J checkpoint needs it") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return raw


@dataclass(frozen=True)
class EngineConfig:
    """The settings of one engine: FasterTransformer's parameters of `config.pbtxt`, then this backend's own.

    `kv_cache_gib` bounds the KV cache on a CPU; `step_tokens` is the most tokens of prompts that one step computes, so
    that a long prompt does not stall running requests; `max_sequences` is the most sequences that run at once.
    """

    model_checkpoint_path: str
    tensor_para_size: int = 1
    pipeline_para_size: int = 1
    data_type: str = "auto"
    model_type: str = "GPT-J"
    enable_custom_all_reduce: int = 0
    int8_mode: int = 0
    device: str = "auto"
    engine_python: str = "python3"
    kv_cache_gib: float = 1.0
    step_tokens: int = 256
    max_sequences: int = 128

    def __post_init__(self) -> None:
        only: dict[str, tuple[object, ...]] = {
            "tensor_para_size": (1,),
            "pipeline_para_size": (1,),
            "data_type": DATA_TYPES,
            "model_type": ("GPT-J",),
            "enable_custom_all_reduce": (0,),
            "int8_mode": (0,),
            "device": DEVICES,
        }
        for name, allowed in only.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"parameter {name} is {value!r}, allowed: {', '.join(map(str, allowed))}")
        for name in ("kv_cache_gib", "step_tokens", "max_sequences"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"parameter {name} is {getattr(self, name)}, allowed: more than 0, and finite")

    @property
    def checkpoint(self) -> Path:
        return Path(self.model_checkpoint_path)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], default_checkpoint: Path) -> EngineConfig:
        """Build from the parameters of `config.pbtxt`, all strings; an empty value means the default.

        Raises ConfigError for an unknown name, a value of the wrong type or one out of range.
        """
        types = {field.name: field.type for field in fields(cls)}
        convert: dict[str, type] = {"int": int, "float": float, "str": str}
        values: dict[str, Any] = {"model_checkpoint_path": str(default_checkpoint)}
        for name, text in parameters.items():
            if name not in types:
                raise ConfigError(f"parameter {name} is unknown, known: {', '.join(types)}")
            if text == "":
                continue
            try:
                values[name] = convert[str(types[name])](text)
            except ValueError:
                raise ConfigError(f"parameter {name} is {text!r}, expected {types[name]}") from None
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        return cls(**json.loads(text))
