"""The data types, by the names that users write. Does not import torch until a `torch.dtype` is asked for.

The types of the weights, of the computation and of the KV cache are three things. Weights and computation have a table
each. The KV cache has the type of the computation, and weights are converted to it when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DataType:
    """A floating-point type of `bytes` bytes a number.

    `name` is what options, `config.pbtxt` and FasterTransformer's `config.ini` say, `torch_name` what torch and
    Hugging Face's `config.json` say, `safetensors_name` what the header of a safetensors file says.
    """

    name: str
    bytes: int
    torch_name: str
    safetensors_name: str

    @property
    def dtype(self) -> torch.dtype:
        # Imported here: the settings and the launcher read the names, where torch may be missing.
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype


FP32 = DataType("fp32", 4, "float32", "F32")
FP16 = DataType("fp16", 2, "float16", "F16")
BF16 = DataType("bf16", 2, "bfloat16", "BF16")

# What a checkpoint's files may store, and what the engine may compute with.
WEIGHT_TYPES = {data_type.name: data_type for data_type in (FP32, FP16, BF16)}
COMPUTE_TYPES = {data_type.name: data_type for data_type in (FP32, FP16, BF16)}
# e4m3: the matrices of the layers and their inputs, scaled to it. All else is fp16.
FP8 = "fp8"
