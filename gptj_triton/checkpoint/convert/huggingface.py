"""Writes Hugging Face's model.safetensors or, where that would be too large, its shards and their index."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptj_triton.checkpoint.convert.output import Writer, create, read_tensor
from gptj_triton.checkpoint.data_types import DataType
from gptj_triton.checkpoint.families.family import ModelFamily, joint_shape
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import TensorSpec, model_tensors
from gptj_triton.checkpoint.weights import WeightSource

SHARD_BYTES = 5_000_000_000  # the most of one safetensors file, as transformers saves them


@dataclass(frozen=True)
class FileShard:
    """One safetensors file: its name, and the tensors of the table whose Hugging Face tensors are in it."""

    name: str
    tensors: list[TensorSpec]


def write_huggingface(
    partial: Path, source: WeightSource, config: ModelConfig, data_type: DataType, shard_bytes: int
) -> None:
    """Write what `partial` lacks of the files, each of `shard_bytes` at most or of one tensor."""
    shards = plan_shards(config, data_type, shard_bytes)
    headers = [safetensors_header(shard, config.family, data_type) for shard in shards]
    total = sum(data_bytes for _, _, data_bytes in headers)
    writer = Writer(partial, total)
    with writer.bar:
        for shard, (header, _, data_bytes) in zip(shards, headers, strict=True):
            if writer.has(shard.name, len(header) + data_bytes):
                continue
            with create(partial / shard.name) as file:
                file.write(header)
                for tensor in shard.tensors:
                    for views in config.family.views(tensor.name, read_tensor(source, tensor, data_type)).values():
                        for view in views:
                            writer.write_tensor(file, view)
    if len(shards) > 1:
        weight_map = {name: shard.name for shard, (_, names, _) in zip(shards, headers, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plan_shards(config: ModelConfig, data_type: DataType, shard_bytes: int) -> list[FileShard]:
    """Tensors in their order, as many to a file as `shard_bytes` hold, one at least."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in model_tensors(config).values():
        tensor_bytes = torch.Size(tensor.shape).numel() * data_type.bytes
        if groups[-1] and size + tensor_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor_bytes
    if len(groups) == 1:
        return [FileShard("model.safetensors", groups[0])]
    return [
        FileShard(f"model-{number:05}-of-{len(groups):05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def safetensors_header(shard: FileShard, family: ModelFamily, data_type: DataType) -> tuple[bytes, list[str], int]:
    """The header as it stands in the file, the names of the shard's tensors, and the bytes of their data.

    Written here, because the library wants all tensors of a file in memory. Source: the format's description,
    https://huggingface.co/docs/safetensors.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard.tensors:
        meta = torch.empty(tensor.shape, dtype=data_type.dtype, device="meta")
        for name, views in family.views(tensor.name, meta).items():
            end = offset + sum(view.nbytes for view in views)
            entries[name] = {
                "dtype": data_type.safetensors_name,
                "shape": joint_shape(views),
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [name for name in entries if name != "__metadata__"], offset
