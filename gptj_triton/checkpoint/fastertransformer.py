"""Reads tensors from FasterTransformer's `model.*.bin`: raw and little-endian, split for any number of GPUs.

Knows the names of the files; knows nothing of how the weights are used.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from gptj_triton.checkpoint.config_ini import read_config_ini
from gptj_triton.checkpoint.data_types import WEIGHT_TYPES
from gptj_triton.checkpoint.files import CONFIG_INI
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import TensorSpec, check_split, model_tensors
from gptj_triton.errors import ConfigError
from gptj_triton.stand_ins import refuse_stand_in

RANK = re.compile(r"model\.layers\.\d+\..*\.(\d+)\.bin")


def part_files(tensor: TensorSpec, tensor_para_size: int) -> list[str]:
    """The names of a tensor's files, one a rank where it is split."""
    if tensor.split is None:
        return [f"model.{tensor.name}.bin"]
    return [f"model.{tensor.name}.{rank}.bin" for rank in range(tensor_para_size)]


class FasterTransformerWeights:
    """The tensors of one directory. The size of every file is checked at the start, before any weight is read."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        """Raises ConfigError naming the file, what was expected and what was found."""
        self._directory = directory
        self._tensors = model_tensors(config)
        self.data_type = _read_data_type(directory / CONFIG_INI)
        sizes = {path.name: path.stat().st_size if path.exists() else -1 for path in directory.glob("model.*.bin")}
        ranks = [int(match[1]) for name in sizes if (match := RANK.fullmatch(name))]
        self._tensor_para_size = max(ranks, default=0) + 1
        try:
            check_split(config, self._tensor_para_size)
        except ConfigError as error:
            raise ConfigError(f"{directory}: the files count {self._tensor_para_size} ranks, but {error}") from None
        for tensor in self._tensors.values():
            self._check(tensor, sizes)
        if sizes:
            raise ConfigError(f"{directory / min(sizes)} belongs to no tensor of the GPT-J that config.ini describes")

    def copy(self, name: str, destination: Tensor) -> None:
        """Fill `destination`, whose shape is the table's, with the tensor `name`, converted to its type and device."""
        tensor, dtype = self._tensors[name], WEIGHT_TYPES[self.data_type].dtype
        views = tensor.parts(destination, self._tensor_para_size)
        for file, view in zip(part_files(tensor, self._tensor_para_size), views, strict=True):
            path = str(self._directory / file)
            try:
                stored = torch.from_file(path, shared=False, size=view.numel(), dtype=dtype)
            except RuntimeError as error:
                raise ConfigError(f"{path} cannot be read: {error}") from None
            view.copy_(stored.to(view.device).view(view.shape))

    def _check(self, tensor: TensorSpec, sizes: dict[str, int]) -> None:
        """Compare the files of a tensor with the sizes they must have, and remove them from `sizes`."""
        meta = torch.empty(tensor.shape, dtype=WEIGHT_TYPES[self.data_type].dtype, device="meta")
        views = tensor.parts(meta, self._tensor_para_size)
        for file, view in zip(part_files(tensor, self._tensor_para_size), views, strict=True):
            expected, found = view.numel() * view.itemsize, sizes.pop(file, None)
            if found != expected:
                refuse_stand_in(self._directory / file)
                raise ConfigError(
                    f"{self._directory / file} {'is missing' if found is None else f'has {found} bytes'}, "
                    f"expected {expected} bytes: {list(view.shape)} of {self.data_type} by config.ini"
                )


def _read_data_type(path: Path) -> str:
    """The type of the files; FasterTransformer takes fp32 where config.ini does not say."""
    data_type = read_config_ini(path).get("weight_data_type", "fp32")
    if data_type not in WEIGHT_TYPES:
        raise ConfigError(f"{path}: weight_data_type is {data_type!r}, allowed: {', '.join(WEIGHT_TYPES)}")
    return data_type
