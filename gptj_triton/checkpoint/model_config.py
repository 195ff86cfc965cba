"""The shape of a checkpoint, read once and frozen. Knows no tensors."""

from __future__ import annotations

import configparser
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gptj_triton.checkpoint.files import CONFIG_INI, find_checkpoint_files
from gptj_triton.errors import ConfigError

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
