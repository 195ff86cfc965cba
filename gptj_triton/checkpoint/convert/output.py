"""Reads tensors from a source and writes them to files that are whole or absent. Knows neither kind of checkpoint."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from gptj_triton.checkpoint.data_types import DataType
from gptj_triton.checkpoint.tensor_table import TensorSpec
from gptj_triton.checkpoint.weights import WeightSource
from gptj_triton.errors import ConfigError

UNFINISHED = ".unfinished"


@contextlib.contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when it is complete and on disk."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


class Writer:
    """Writes tensors to files of a directory, and shows a progress bar over their bytes."""

    def __init__(self, directory: Path, total_bytes: int) -> None:
        self._directory = directory
        self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=directory.stem, mininterval=0.5)

    def has(self, name: str, size: int) -> bool:
        """Whether an earlier run has finished the file; the bar then counts it as done."""
        path = self._directory / name
        done = path.is_file() and path.stat().st_size == size
        if done:
            self.bar.update(size)
        return done

    def write_tensor(self, file: BinaryIO, tensor: Tensor) -> None:
        """Write raw numbers: little-endian, C order."""
        file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        self.bar.update(tensor.nbytes)


def read_tensor(source: WeightSource, tensor: TensorSpec, data_type: DataType) -> Tensor:
    """The unsharded tensor as `data_type`; ConfigError where that type cannot hold a value."""
    full = torch.empty(tensor.shape, dtype=data_type.dtype)
    source.copy(tensor.name, full)
    # Two numbers, NaN where there is one in the tensor; isfinite would make a tensor of its own.
    if not all(math.isfinite(extreme) for extreme in full.aminmax()):
        raise ConfigError(f"{tensor.name} has values that {data_type.name} cannot hold")
    return full
