"""The shape of a GPT-J checkpoint and the settings of an engine, each read once and frozen. Knows no tensors."""

from __future__ import annotations

import configparser
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gptj_engine.checkpoint_files import CONFIG_INI, find_checkpoint_files
from gptj_engine.errors import ConfigError

DATA_TYPES = ("auto", "fp32", "fp16", "bf16")
DEVICES = ("auto", "cpu", "cuda")
# FasterTransformer's files do not say it, and its kernels take 1e-6; GPT-J was trained with this.
GPTJ_LAYER_NORM_EPS = 1e-5
# What `config.ini` may say besides the shape, the last three for checkpoints with prompt-tuning tasks.
INI_KEYS = ("model_name", "weight_data_type", "num_tasks", "prompt_learning_start_id", "prompt_learning_type")


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
    def read(cls, checkpoint: Path, context_length: int = 0) -> ModelConfig:
        """Read the configuration of a checkpoint of either kind; `context_length` is for one that does not say it.

        Raises ConfigError naming the file, the key and what was found.
        """
        files = find_checkpoint_files(checkpoint)
        path = files.find("config.json")
        if not files.is_fastertransformer:
            config = cls.from_huggingface(files.directory)
        elif path is not None:
            config = cls.from_huggingface(path.parent)
            config._check_agreement(path, files.directory / CONFIG_INI)
        elif context_length:
            config = cls.from_fastertransformer(files.directory / CONFIG_INI, context_length, GPTJ_LAYER_NORM_EPS)
        else:
            raise ConfigError(
                f"{files.directory / CONFIG_INI} does not say how many tokens the context holds, and no config.json "
                "stands beside it: set context_length"
            )
        if context_length not in (0, config.context_length):
            raise ConfigError(f"context_length is {context_length}, but {path} says {config.context_length}")
        return config

    @classmethod
    def from_fastertransformer(cls, path: Path, context_length: int, layer_norm_eps: float) -> ModelConfig:
        """Read FasterTransformer's `config.ini`, which says neither of the other arguments.

        Raises ConfigError naming the file, the key and what was found.
        """
        raw = read_config_ini(path)

        def whole(key: str, least: int) -> int:
            if key not in raw:
                raise ConfigError(f"{path} has no key {key!r}")
            if not raw[key].isdecimal() or int(raw[key]) < least:
                raise ConfigError(f"{path}: {key} is {raw[key]!r}, expected a whole number of {least} or more")
            return int(raw[key])

        num_heads, head_size = whole("head_num", 1), whole("size_per_head", 1)
        # NVIDIA's converter writes so where Hugging Face's rotary_dim is null: the whole head is turned.
        whole_head = raw.get("rotary_embedding") == "None"
        config = cls(
            vocab_size=whole("vocab_size", 1),
            context_length=context_length,
            hidden_size=num_heads * head_size,
            inner_size=whole("inter_size", 1),
            num_layers=whole("num_layer", 1),
            num_heads=num_heads,
            rotary_dim=head_size if whole_head else whole("rotary_embedding", 2),
            layer_norm_eps=layer_norm_eps,
            start_id=whole("start_id", 0),
            end_id=whole("end_id", 0),
        )
        if raw.get("num_tasks", "0") != "0":
            raise ConfigError(f"{path}: num_tasks is {raw['num_tasks']}, but prompt-tuning tasks are not supported")
        shape = {"head_num", "size_per_head", "inter_size", "num_layer", "rotary_embedding", "vocab_size"}
        unknown = sorted(set(raw) - shape - {"start_id", "end_id", *INI_KEYS})
        if unknown:
            raise ConfigError(f"{path} has the unknown key {unknown[0]!r}")
        config._check_rotary(path, "rotary_embedding")
        return config

    def _check_agreement(self, path: Path, config_ini: Path) -> None:
        other = self.from_fastertransformer(config_ini, self.context_length, self.layer_norm_eps)
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine != others:
                raise ConfigError(f"{path} says {field.name} is {mine}, but {config_ini} says {others}")

    def _check_rotary(self, path: Path, key: str) -> None:
        if self.rotary_dim % 2 or self.rotary_dim > self.head_size:
            raise ConfigError(f"{path}: {key} is {self.rotary_dim}, expected an even number <= {self.head_size}")

    def to_huggingface(self) -> dict[str, Any]:
        """The contents of a `config.json` that says the same."""
        return {
            "architectures": ["GPTJForCausalLM"],
            "model_type": "gptj",
            "activation_function": "gelu_new",
            "vocab_size": self.vocab_size,
            "n_positions": self.context_length,
            "n_embd": self.hidden_size,
            "n_inner": self.inner_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "rotary_dim": self.rotary_dim,
            "layer_norm_epsilon": self.layer_norm_eps,
            "bos_token_id": self.start_id,
            "eos_token_id": self.end_id,
            "tie_word_embeddings": False,
        }

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
        config._check_rotary(path, "rotary_dim")
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


def read_config_ini(path: Path) -> dict[str, str]:
    """The section `[gptj]` of FasterTransformer's `config.ini`; ConfigError where it cannot be read."""
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";",))
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
        return dict(parser["gptj"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; FasterTransformer's files need it") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no ini file: {' '.join(str(error).split())}") from None
    except KeyError:
        raise ConfigError(f"{path} has no section [gptj], found: {', '.join(parser.sections()) or 'none'}") from None


@dataclass(frozen=True)
class EngineConfig:
    """The settings of one engine: FasterTransformer's parameters of `config.pbtxt`, then this backend's own.

    `kv_cache_gib` bounds the KV cache; 0 means 1 GiB on a CPU and all that is left on a GPU. `step_tokens` is the most
    tokens of prompts that one step computes, so that a long prompt does not stall running requests (0 means 256 on a
    CPU and 2048 on a GPU); `max_sequences` is the most sequences that run at once (0 means 128 and 512).
    `context_length` in tokens and `tokenizer_dir` are for a checkpoint that does not say the one and lacks the other; 0
    and the empty string mean the checkpoint's own.
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
    kv_cache_gib: float = 0.0
    step_tokens: int = 0
    max_sequences: int = 0
    context_length: int = 0
    tokenizer_dir: str = ""

    def __post_init__(self) -> None:
        only: dict[str, tuple[object, ...]] = {
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
        least = {"tensor_para_size": 1, "kv_cache_gib": 0, "step_tokens": 0, "max_sequences": 0, "context_length": 0}
        for name, minimum in least.items():
            if not minimum <= getattr(self, name) < math.inf:
                raise ConfigError(f"parameter {name} is {getattr(self, name)}, allowed: {minimum} or more, and finite")

    def for_device(self, is_gpu: bool) -> EngineConfig:
        """The same with the sizes of a step, where they were left open, that suit a GPU or a CPU."""
        step_tokens, max_sequences = (2048, 512) if is_gpu else (256, 128)
        return replace(
            self, step_tokens=self.step_tokens or step_tokens, max_sequences=self.max_sequences or max_sequences
        )

    @property
    def checkpoint(self) -> Path:
        return Path(self.model_checkpoint_path)

    @property
    def tokenizer(self) -> Path:
        """Where `tokenizer.json` is looked for, as a checkpoint is."""
        return Path(self.tokenizer_dir or self.model_checkpoint_path)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], repository: Path) -> EngineConfig:
        """Build from the parameters of `config.pbtxt`, all strings; an empty value means the default.

        A relative path starts at `repository`. Raises ConfigError for an unknown name, a value of the wrong type, one
        out of range, or a checkpoint that is not named.
        """
        types = {field.name: field.type for field in fields(cls)}
        convert: dict[str, type] = {"int": int, "float": float, "str": str}
        values: dict[str, Any] = {}
        for name, text in parameters.items():
            if name not in types:
                raise ConfigError(f"parameter {name} is unknown, known: {', '.join(types)}")
            if text == "":
                continue
            try:
                values[name] = convert[str(types[name])](text)
            except ValueError:
                raise ConfigError(f"parameter {name} is {text!r}, expected {types[name]}") from None
        if "model_checkpoint_path" not in values:
            raise ConfigError("parameter model_checkpoint_path is missing, expected the directory of a checkpoint")
        for name in ("model_checkpoint_path", "tokenizer_dir"):
            if name in values:
                values[name] = str(repository / values[name])
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        return cls(**json.loads(text))
