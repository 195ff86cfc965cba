"""Writes FasterTransformer's config.ini and model.*.bin, a file for each part of a tensor."""

from __future__ import annotations

import configparser
from pathlib import Path

import torch

from gptj_triton.checkpoint.convert.output import Writer, create, read_tensor
from gptj_triton.checkpoint.data_types import DataType
from gptj_triton.checkpoint.fastertransformer import part_files
from gptj_triton.checkpoint.files import CONFIG_INI
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import model_tensors
from gptj_triton.checkpoint.weights import WeightSource


def write_fastertransformer(
    partial: Path, source: WeightSource, config: ModelConfig, data_type: DataType, tensor_para_size: int
) -> None:
    """Write what `partial` lacks of the files; each tensor is split for `tensor_para_size` GPUs."""
    tensors = model_tensors(config).values()
    metas = [torch.empty(tensor.shape, dtype=data_type.dtype, device="meta") for tensor in tensors]
    writer = Writer(partial, sum(meta.nbytes for meta in metas))
    with writer.bar:
        for tensor, meta in zip(tensors, metas, strict=True):
            names = part_files(tensor, tensor_para_size)
            sizes = [part.nbytes for part in tensor.parts(meta, tensor_para_size)]
            missing = [name for name, size in zip(names, sizes, strict=True) if not writer.has(name, size)]
            full = read_tensor(source, tensor, data_type) if missing else meta
            for name, part in zip(names, tensor.parts(full, tensor_para_size), strict=True):
                if name in missing:
                    with create(partial / name) as file:
                        writer.write_tensor(file, part)
    ini = configparser.ConfigParser(interpolation=None)
    ini["gptj"] = {"model_name": "gptj", **config.to_fastertransformer(), "weight_data_type": data_type.name}
    with (partial / CONFIG_INI).open("w", encoding="utf-8") as text:
        ini.write(text)
