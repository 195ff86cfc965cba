"""Which device and data type an engine computes with, and how much memory that leaves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gptj_triton.checkpoint.data_types import COMPUTE_TYPES, FP8, FP16, FP32, DataType
from gptj_triton.errors import ConfigError

FLOAT8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
SPARE_MEMORY = 0.03  # of a GPU, left to fragmentation and the libraries' workspaces


def memory_left(device: torch.device, compute: Callable[[], object]) -> int:
    """Bytes of a GPU that `compute` leaves when it takes the most, and some are spared."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - peak - SPARE_MEMORY * total)


def choose_device(name: str, rank: int = 0, size: int = 1) -> torch.device:
    """The device that `name` (auto, cpu or cuda) stands for here, for one of `size` ranks.

    Raises ConfigError when there is no such one, or there are too few.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA GPU here")
    if torch.cuda.device_count() < size:
        raise ConfigError(f"tensor_para_size is {size}, but torch finds {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda", rank)


def compute_type(name: str, device: torch.device) -> DataType:
    """What is computed with on a device, by the setting `data_type`: auto, fp32, fp16, bf16 or fp8."""
    if name == "auto":
        return FP16 if device.type == "cuda" else FP32
    return FP16 if name == FP8 else COMPUTE_TYPES[name]
