"""Reads GPT-J's weights from a Hugging Face directory into the engine's merged matrices, one tensor at a time.

Knows the file formats and the names of tensors; knows nothing of how the weights are used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptj_engine.config import ModelConfig
from gptj_engine.errors import ConfigError
from gptj_engine.transformer import LayerWeights, ModelWeights

Reader = Callable[[str], Tensor]


def load_weights(checkpoint: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Load all weights as `dtype` to `device`; never holds more than one tensor besides the result.

    Raises ConfigError naming the file, what was expected and what was found.
    """
    read = _open_checkpoint(checkpoint)
    hidden, inner = config.hidden_size, config.inner_size

    def load(name: str, *shape: int) -> Tensor:
        tensor = read(name)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{checkpoint}: {name} has shape {list(tensor.shape)}, expected {list(shape)} by config.json"
            )
        return tensor.to(device=device, dtype=dtype)

    def load_layer(number: int) -> LayerWeights:
        prefix = f"transformer.h.{number}."
        in_weight = torch.empty(hidden, 3 * hidden + inner, dtype=dtype, device=device)
        for column, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            columns = slice(column * hidden, (column + 1) * hidden)
            in_weight[:, columns] = load(f"{prefix}attn.{projection}.weight", hidden, hidden).T
        in_weight[:, 3 * hidden :] = load(f"{prefix}mlp.fc_in.weight", inner, hidden).T
        in_bias = torch.zeros(3 * hidden + inner, dtype=dtype, device=device)
        in_bias[3 * hidden :] = load(f"{prefix}mlp.fc_in.bias", inner)
        out_weight = torch.empty(hidden + inner, hidden, dtype=dtype, device=device)
        out_weight[:hidden] = load(f"{prefix}attn.out_proj.weight", hidden, hidden).T
        out_weight[hidden:] = load(f"{prefix}mlp.fc_out.weight", hidden, inner).T
        return LayerWeights(
            norm_weight=load(f"{prefix}ln_1.weight", hidden),
            norm_bias=load(f"{prefix}ln_1.bias", hidden),
            in_weight=in_weight,
            in_bias=in_bias,
            out_weight=out_weight,
            out_bias=load(f"{prefix}mlp.fc_out.bias", hidden),
        )

    return ModelWeights(
        embedding=load("transformer.wte.weight", config.vocab_size, hidden),
        layers=[load_layer(number) for number in range(config.num_layers)],
        norm_weight=load("transformer.ln_f.weight", hidden),
        norm_bias=load("transformer.ln_f.bias", hidden),
        head_weight=load("lm_head.weight", config.vocab_size, hidden).T.contiguous(),
        head_bias=load("lm_head.bias", config.vocab_size),
    )


def _open_checkpoint(checkpoint: Path) -> Reader:
    """A reader of tensors by name, from whichever of the Hugging Face layouts the directory has."""
    for name, open_file in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_pickle)):
        index = checkpoint / f"{name}.index.json"
        if index.exists():
            return _open_shards(index, open_file)
        if (checkpoint / name).exists():
            return open_file(checkpoint / name)
    raise ConfigError(
        f"{checkpoint} holds neither model.safetensors nor pytorch_model.bin (nor an .index.json of either)"
    )


def _open_shards(index: Path, open_file: Callable[[Path], Reader]) -> Reader:
    try:
        file_of: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is no index of weights: {error!r}") from None
    opened: dict[str, Reader] = {}

    def read(name: str) -> Tensor:
        if name not in file_of:
            raise ConfigError(f"{index} names no file for the tensor {name}")
        file = file_of[name]
        if file not in opened:
            opened[file] = open_file(index.parent / file)
        return opened[file](name)

    return read


def _open_safetensors(path: Path) -> Reader:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    names = set(file.keys())

    def read(name: str) -> Tensor:
        if name not in names:
            raise ConfigError(f"{path} has no tensor {name}")
        tensor: Tensor = file.get_tensor(name)
        return tensor

    return read


def _open_pickle(path: Path) -> Reader:
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None

    def read(name: str) -> Tensor:
        if name not in tensors:
            raise ConfigError(f"{path} has no tensor {name}")
        return tensors[name]

    return read
