"""Reads tensors from a Hugging Face directory: safetensors or pytorch_model.bin, in one file or sharded.

The model's family says how its tensors become those of the tensor table. Knows nothing of how the weights are used.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptj_triton.checkpoint.data_types import WEIGHT_TYPES
from gptj_triton.checkpoint.families.family import ModelFamily, joint_shape
from gptj_triton.checkpoint.files import HUGGINGFACE_WEIGHTS
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import model_tensors
from gptj_triton.errors import ConfigError
from gptj_triton.stand_ins import refuse_stand_in
from gptj_triton.text.json_files import read_object

# What training tools put around a model and leave in the names of its tensors, in front or between.
WRAPPERS = re.compile(r"\b(module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The model's own part of a name. In front of it are the names of what holds the model, such as "transformer.".
OWN_NAME = re.compile(r"(^|\.)(?P<name>(wte|h\.\d+|ln_f|lm_head)\..+)")
# What torch says of a pickle, without its advice to load it with code.
UNPICKLING_REASON = re.compile(r"(Unsupported global: GLOBAL \S+|unsupported GLOBAL \S+|Unsupported operand \d+)")
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")  # where training tools put the tensors


class HuggingFaceWeights:
    """The tensors of one directory. Names and shapes are all checked at the start, before any weight is read."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        """Raises ConfigError naming the file, what was expected and what was found."""
        self._family = config.family
        self._origin, self._file_of = _open_files(directory, self._family)
        self._keys: dict[str, str] = {}  # in the files, by own name
        for key, file in self._file_of.items():
            first = self._keys.setdefault(own_name(key), key)
            if first != key:
                raise ConfigError(
                    f"{file.path} has the tensor {key}, which a {self._family.name} of this config.json has not "
                    f"beside {first}"
                )
        self._tied = _has_tied_embeddings(directory)
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor in model_tensors(config).values():
            for name, views in self._family.views(tensor.name, torch.empty(tensor.shape, device="meta")).items():
                shapes[self._key(name)] = joint_shape(views)
        for key, shape in shapes.items():
            self._check(key, shape)
        for name, key in self._keys.items():
            if key not in shapes and not self._family.legacy_buffers.fullmatch(name):
                raise ConfigError(
                    f"{self._file_of[key].path} has the tensor {key}, which a {self._family.name} of this config.json "
                    "has not"
                )

    @property
    def data_type(self) -> str | None:
        """The type of the embedding, as its name in WEIGHT_TYPES; None for any other type."""
        key = self._key(self._family.outer_names["wte"])
        dtype = self._file_of[key].read(key).dtype
        return next((name for name, known in WEIGHT_TYPES.items() if known.dtype is dtype), None)

    def copy(self, name: str, destination: Tensor) -> None:
        """Fill `destination`, whose shape is the table's, with the tensor `name`, converted to its type and device."""
        for stored, views in self._family.views(name, destination).items():
            key = self._key(stored)
            tensor = self._file_of[key].read(key)
            if not tensor.is_floating_point():
                raise ConfigError(f"{self._file_of[key].path}: {key} is of {tensor.dtype}, expected floating point")
            # First to the device: that transposes and converts faster.
            parts = tensor.to(destination.device).split([len(view) for view in views])
            for view, part in zip(views, parts, strict=True):
                view.copy_(part)

    def _key(self, name: str) -> str:
        """The name in this checkpoint's files; `name` itself where they lack it."""
        outer_names = self._family.outer_names
        if name == outer_names["lm_head.weight"] and self._tied and own_name(name) not in self._keys:
            return self._key(outer_names["wte"])
        return self._keys.get(own_name(name), name)

    def _check(self, key: str, shape: tuple[int, ...]) -> None:
        if key not in self._file_of:
            verb = "names no file for the tensor" if self._origin.suffix == ".json" else "has no tensor"
            raise ConfigError(f"{self._origin} {verb} {key}")
        file = self._file_of[key]
        if key not in file.shapes:
            raise ConfigError(f"{file.path} has no tensor {key}")
        if file.shapes[key] != shape:
            found, expected = list(file.shapes[key]), list(shape)
            raise ConfigError(f"{file.path}: {key} has shape {found}, expected {expected} by config.json")


def own_name(key: str) -> str:
    """What is left of a tensor's name without wrappers and without what holds the model; all, if there is nothing.

    The model without its head, such as GPTJModel, is saved without "transformer."; DataParallel puts "module." in
    front, torch.compile "_orig_mod.", and trainers what they call the model.
    """
    found = OWN_NAME.search(WRAPPERS.sub("", key))
    return found["name"] if found else key


class _WeightsFile(Protocol):
    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str) -> Tensor: ...


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_stand_in(path)
        # safetensors would say that there is no such file.
        if path.is_file() and not os.access(path, os.R_OK, effective_ids=True):
            raise ConfigError(f"{path} cannot be read: Permission denied")
        try:
            with safe_open(path, framework="pt") as file:
                self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None

    def read(self, key: str) -> Tensor:
        # Opened each time, so that no more than this tensor of the file stays in memory.
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


class _PickledFile:
    """A file of torch.save. Before torch 1.6 these were no zip files: such a one cannot be mapped, and stays in memory
    as long as this object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_stand_in(path)
        self._kept = None if path.is_file() and zipfile.is_zipfile(path) else self._load(mmap=False)
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors().items()}

    def read(self, key: str) -> Tensor:
        return self._tensors()[key]

    def _tensors(self) -> dict[str, Tensor]:
        # Mapped each time, for the same reason as above.
        return self._load(mmap=True) if self._kept is None else self._kept

    def _load(self, mmap: bool) -> dict[str, Tensor]:
        """Never runs code from the file: `weights_only` makes tensors and plain values, and refuses all else."""
        try:
            tensors = torch.load(self.path, map_location="cpu", mmap=mmap, weights_only=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from None
        except Exception as error:  # torch raises errors of many kinds for a damaged file
            reason = UNPICKLING_REASON.search(str(error))
            short = (
                f"it holds more than tensors ({reason[0]}), and code of a checkpoint is never run"
                if reason
                else str(error).partition(". ")[0]
            )
            raise ConfigError(f"{self.path} cannot be read: {short or 'it ends too early'}") from None
        for name in STATE_DICTS:
            if isinstance(tensors, dict) and isinstance(tensors.get(name), dict):
                tensors = tensors[name]
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ConfigError(f"{self.path} holds something else than tensors by name")
        return {key: tensor.detach() for key, tensor in tensors.items()}  # parameters ask for gradients


def _open_files(directory: Path, family: ModelFamily) -> tuple[Path, dict[str, _WeightsFile]]:
    """The file or index that lists the tensors, and the file of each, from whichever layout the directory has."""
    kinds: tuple[Callable[[Path], _WeightsFile], ...] = (_SafetensorsFile, _PickledFile)
    for name, open_file in zip(HUGGINGFACE_WEIGHTS, kinds, strict=True):
        if os.path.lexists(directory / name):  # it comes first in transformers, too
            file = open_file(directory / name)
            return file.path, dict.fromkeys(file.shapes, file)
        index = directory / f"{name}.index.json"
        if os.path.lexists(index):
            file_of = _read_index(index)
            opened = {file: open_file(directory / file) for file in sorted(set(file_of.values()))}
            # A tensor that the index leaves out is as unknown as one that it names.
            unlisted = {key: file for file in opened.values() for key in file.shapes if key not in file_of}
            for key, unlisted_file in unlisted.items():
                if not family.legacy_buffers.fullmatch(key):
                    raise ConfigError(f"{index} names no file for the tensor {key}, which is in {unlisted_file.path}")
            return index, {key: opened[file] for key, file in file_of.items()}
    raise ConfigError(
        f"{directory} holds neither {' nor '.join(HUGGINGFACE_WEIGHTS)} (nor an .index.json of either), "
        "and no config.ini of FasterTransformer"
    )


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConfigError(f"{index} is no index of weights: weight_map is {weight_map!r}, expected an object")
    for key, file in weight_map.items():
        if not isinstance(file, str):
            raise ConfigError(f"{index} names {file!r} for the tensor {key}, expected a file")
    return weight_map


def _has_tied_embeddings(directory: Path) -> bool:
    """Whether config.json lets the output matrix be the embedding, which is then saved once."""
    path = directory / "config.json"
    return path.is_file() and read_object(path).get("tie_word_embeddings") is True
