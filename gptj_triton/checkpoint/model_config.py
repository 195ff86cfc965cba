"""The shape of a checkpoint, read once and frozen. Knows no tensors."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptj_triton.checkpoint.config_ini import python_value, read_config_ini
from gptj_triton.checkpoint.families import FAMILIES
from gptj_triton.checkpoint.families.family import ConfigKey, ModelFamily
from gptj_triton.checkpoint.families.gptj import GPTJ
from gptj_triton.checkpoint.files import CONFIG_INI, find_checkpoint_files
from gptj_triton.errors import ConfigError
from gptj_triton.text.end_ids import GENERATION_CONFIG, check_end_ids, read_end_ids
from gptj_triton.text.json_files import read_object

log = logging.getLogger("gptj_triton")

# FasterTransformer's files lack it, and its kernels use 1e-6; GPT-J was trained with this.
GPTJ_LAYER_NORM_EPS = 1e-5
GPTJ_CONTEXT_LENGTH = 2048  # which they lack, too; what CodeGen was trained with is the same
# Keys of `config.ini` besides the shape; the last three are for checkpoints with prompt-tuning tasks.
OTHER_INI_KEYS = {"model_name", "weight_data_type", "num_tasks", "prompt_learning_start_id", "prompt_learning_type"}


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint says of itself; lengths count tokens. `model_type` is that of a family of the registry.

    Each of `end_ids` ends a text; there may be none.
    """

    vocab_size: int
    context_length: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    rotary_dim: int
    layer_norm_eps: float
    start_id: int
    end_ids: tuple[int, ...]
    model_type: str = "gptj"

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def family(self) -> ModelFamily:
        return FAMILIES[self.model_type]

    @classmethod
    def read(cls, checkpoint: Path, context_length: int = 0, max_seq_len: int = 0) -> ModelConfig:
        """Read the configuration of a checkpoint of either kind.

        `context_length` is for one that does not say it, and must not contradict one that does. `max_seq_len` is taken
        where neither says it, and GPT-J's own, with a warning, where nothing does. Raises ConfigError naming the file,
        the key and what was found.
        """
        files = find_checkpoint_files(checkpoint)
        path = files.find("config.json")
        config_ini = files.directory / CONFIG_INI
        if not files.is_fastertransformer:
            config = cls.from_huggingface(files.directory)
        elif path is not None:
            config = cls.from_huggingface(path.parent)
            config._check_agreement(path, config_ini)
        else:
            given = context_length or max_seq_len
            config = cls.from_fastertransformer(config_ini, given or GPTJ_CONTEXT_LENGTH, GPTJ_LAYER_NORM_EPS)
            generation_config = files.find(GENERATION_CONFIG)
            if generation_config is not None:
                config = replace(config, end_ids=read_end_ids(generation_config, {}, config.vocab_size))
            if not given and "n_positions" not in read_config_ini(config_ini):
                log.warning(
                    "%s does not say how many tokens the context holds, and no config.json stands beside it: %d are "
                    "taken, as GPT-J has (context_length, or --context-length of serve.py, sets another number)",
                    config_ini,
                    GPTJ_CONTEXT_LENGTH,
                )
        if context_length not in (0, config.context_length):
            says = path or config_ini
            raise ConfigError(f"context_length is {context_length}, but {says} says {config.context_length}")
        return config

    @classmethod
    def from_fastertransformer(cls, path: Path, context_length: int, layer_norm_eps: float) -> ModelConfig:
        """Read FasterTransformer's `config.ini`. NVIDIA's lacks the values of the other two arguments; FauxPilot's has
        them, and all else, by the keys of Hugging Face's `config.json`.

        Raises ConfigError naming the file, the key and what was found.
        """
        raw = read_config_ini(path)
        if "n_embd" in raw and "head_num" not in raw:
            if "rotary_dim" not in raw:  # so it is of a GPT-2, which NVIDIA's other converter writes with the same keys
                raise ConfigError(f"{path} has no key 'rotary_dim', so this is no GPT-J")
            lacking = {GPTJ.config_keys["context_length"].name: context_length}
            return cls._from_keys(path, lacking | {key: python_value(text) for key, text in raw.items()}, GPTJ)

        def integer(key: str, minimum: int) -> int:
            if key not in raw:
                raise ConfigError(f"{path} has no key {key!r}")
            if not raw[key].isdecimal() or int(raw[key]) < minimum:
                raise ConfigError(f"{path}: {key} is {raw[key]!r}, expected a whole number of {minimum} or more")
            return int(raw[key])

        num_heads, head_size = integer("head_num", 1), integer("size_per_head", 1)
        # NVIDIA's converter writes so where Hugging Face's rotary_dim is null: the whole head is turned.
        whole_head = raw.get("rotary_embedding") == "None"
        vocab_size = integer("vocab_size", 1)
        config = cls(
            vocab_size=vocab_size,
            context_length=context_length,
            hidden_size=num_heads * head_size,
            inner_size=integer("inter_size", 1),
            num_layers=integer("num_layer", 1),
            num_heads=num_heads,
            rotary_dim=head_size if whole_head else integer("rotary_embedding", 2),
            layer_norm_eps=layer_norm_eps,
            start_id=0 if raw.get("start_id") == "None" else integer("start_id", 0),
            end_ids=_read_end_ids(path, raw, vocab_size),
        )
        if raw.get("num_tasks", "0") != "0":
            raise ConfigError(f"{path}: num_tasks is {raw['num_tasks']}, but prompt-tuning tasks are not supported")
        unknown = sorted(set(raw) - set(config.to_fastertransformer()) - OTHER_INI_KEYS)
        if unknown:
            raise ConfigError(f"{path} has the unknown key {unknown[0]!r}")
        config._check_rotary(path, "rotary_embedding")
        return config

    def to_fastertransformer(self) -> dict[str, str]:
        """What the section `[gptj]` of a `config.ini` says of the shape."""
        return {
            "head_num": str(self.num_heads),
            "size_per_head": str(self.head_size),
            "inter_size": str(self.inner_size),
            "num_layer": str(self.num_layers),
            "rotary_embedding": str(self.rotary_dim),
            "vocab_size": str(self.vocab_size),
            "start_id": str(self.start_id),
            "end_id": str(self.end_ids[0] if self.end_ids else -1),
        }

    @classmethod
    def from_huggingface(cls, checkpoint: Path) -> ModelConfig:
        """Read `config.json` of a Hugging Face directory, by the keys of its family.

        Raises ConfigError naming the file, the key and what was found.
        """
        path = checkpoint / "config.json"
        raw = read_object(path)
        model_type = raw.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ConfigError(f"{path}: model_type is {model_type!r}, expected {' or '.join(map(repr, FAMILIES))}")
        return cls._from_keys(path, raw, family)

    @classmethod
    def _from_keys(cls, path: Path, raw: dict[str, Any], family: ModelFamily) -> ModelConfig:
        """The configuration in the keys of `family`, which were read from `path`."""
        for name, value in family.fixed_keys.items():
            if raw.get(name, value) != value:
                raise ConfigError(f"{path}: {name} is {raw[name]!r}, expected {value!r}")
        values: dict[str, Any] = {"model_type": family.model_type}
        for field, key in family.config_keys.items():
            values[field] = _read_number(path, raw, key, values)
        config = cls(**values, end_ids=read_end_ids(path, raw, values["vocab_size"]))
        keys = {field: key.name for field, key in family.config_keys.items()}
        if config.hidden_size % config.num_heads:
            raise ConfigError(
                f"{path}: {keys['hidden_size']} {config.hidden_size} is no multiple of {keys['num_heads']} "
                f"{config.num_heads}"
            )
        if config.num_heads % family.heads_multiple:
            raise ConfigError(
                f"{path}: {keys['num_heads']} is {config.num_heads}, expected a multiple of {family.heads_multiple}"
            )
        config._check_rotary(path, keys["rotary_dim"])
        return config

    def to_huggingface(self) -> dict[str, Any]:
        """The contents of a `config.json` that says the same."""
        return {
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
            **self.family.fixed_keys,
            **{key.name: getattr(self, field) for field, key in self.family.config_keys.items()},
            "eos_token_id": self.end_ids[0] if len(self.end_ids) == 1 else list(self.end_ids) or None,
            "tie_word_embeddings": False,
        }

    def _check_agreement(self, path: Path, config_ini: Path) -> None:
        """`config.ini` does not know the families: its files are the same for all. It has one end id of several, and
        that of config.json where generation_config.json has others.
        """
        other = self.from_fastertransformer(config_ini, self.context_length, self.layer_norm_eps)
        other = replace(other, model_type=self.model_type)
        if set(other.end_ids) <= set(self.end_ids) or (path.parent / GENERATION_CONFIG).is_file():
            other = replace(other, end_ids=self.end_ids)
        for field, mine in vars(self).items():
            if mine != getattr(other, field):
                raise ConfigError(f"{path} says {field} is {mine}, but {config_ini} says {getattr(other, field)}")

    def _check_rotary(self, path: Path, key: str) -> None:
        if self.rotary_dim % 2 or self.rotary_dim > self.head_size:
            raise ConfigError(f"{path}: {key} is {self.rotary_dim}, expected an even number <= {self.head_size}")


def _read_end_ids(path: Path, raw: dict[str, str], vocab_size: int) -> tuple[int, ...]:
    """The end ids that `config.ini` names. NVIDIA's converter writes Hugging Face's value as Python prints it."""
    if "end_id" not in raw:
        raise ConfigError(f"{path} has no key 'end_id'")
    return check_end_ids(python_value(raw["end_id"]), vocab_size, f"{path}: end_id")


def _read_number(path: Path, raw: dict[str, Any], key: ConfigKey, fields_before: dict[str, Any]) -> float:
    """The value of `key`; ConfigError where it is missing, of the wrong type or too small."""
    value = raw.get(key.name)
    if value is None:
        if key.default is None:
            raise ConfigError(f"{path} has no key {key.name!r}")
        return key.default(fields_before)
    if not isinstance(value, (int, key.kind)) or value < key.minimum:
        number = "whole number" if key.kind is int else "number"
        raise ConfigError(f"{path}: {key.name} is {value!r}, expected a {number} of {key.minimum} or more")
    return key.kind(value)
