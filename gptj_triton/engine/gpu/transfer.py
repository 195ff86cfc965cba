"""Whole numbers on their way from the host to the GPU. Nothing here waits for the GPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptj_triton.engine.step_plan import GroupPlan


def to_device(numbers: object, device: torch.device) -> Tensor:
    """Numbers as a new int32 tensor on the GPU."""
    return torch.as_tensor(numbers, dtype=torch.int32).pin_memory().to(device, non_blocking=True)


def fill(target: Tensor, numbers: NDArray[np.int32]) -> None:
    """Write `numbers` to a tensor on the GPU of the same shape and type."""
    target.copy_(torch.from_numpy(numbers).pin_memory(), non_blocking=True)


def fill_page_tables(tables: NDArray[np.int32], groups: list[GroupPlan]) -> None:
    """Write the page tables of all groups, sequence after sequence, into the first rows of `tables` [S, P]."""
    row = 0
    for group in groups:
        part = np.array(group.tables, np.int32)[:, : tables.shape[1]]
        tables[row : row + len(part), : part.shape[1]] = part
        row += len(part)
