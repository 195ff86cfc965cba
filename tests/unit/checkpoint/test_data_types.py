"""Every name of a data type means the same type, and the names are read without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gptj_triton.checkpoint.data_types import BF16, COMPUTE_TYPES, FP16, FP32, WEIGHT_TYPES, DataType

ALL = (FP32, FP16, BF16)


def test_users_write_fp32_fp16_and_bf16_for_weights_and_for_computation() -> None:
    assert list(WEIGHT_TYPES) == list(COMPUTE_TYPES) == ["fp32", "fp16", "bf16"]
    assert [data_type.dtype for data_type in ALL] == [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("data_type", ALL, ids=lambda data_type: data_type.name)
def test_torch_and_safetensors_agree_with_the_description(data_type: DataType, tmp_path: Path) -> None:
    assert data_type.bytes == data_type.dtype.itemsize
    assert str(data_type.dtype) == f"torch.{data_type.torch_name}"
    save_file({"tensor": torch.zeros(3, dtype=data_type.dtype)}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.get_slice("tensor").get_dtype() == data_type.safetensors_name


def test_settings_options_and_configurations_are_read_without_torch() -> None:
    code = (
        "import sys, gptj_triton.engine.config, gptj_triton.serving.options, gptj_triton.serving.checkpoint;"
        "print('torch' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "False\n"
