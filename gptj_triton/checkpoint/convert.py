"""Converts a GPT-J checkpoint between Hugging Face's layout and FasterTransformer's, or to another split or type.

    python tools/convert_checkpoint.py gpt-j-6b gpt-j-6b-ft/2-gpu --to fastertransformer --tensor-para-size 2

Works a tensor at a time. All is written to DST.partial, which becomes DST when it is complete; after a kill the same
command goes on behind the last file that was finished. Reads through the engine's own sources; knows nothing of Triton.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from gptj_triton.checkpoint.data_types import WEIGHT_TYPES
from gptj_triton.checkpoint.families.family import ModelFamily
from gptj_triton.checkpoint.fastertransformer import part_files
from gptj_triton.checkpoint.files import CONFIG_INI, CheckpointFiles, find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import TensorSpec, check_split, model_tensors
from gptj_triton.checkpoint.weights import WeightSource, open_weights
from gptj_triton.errors import ConfigError

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "generation_config.json"),
)
INPUT_SUFFIXES = {".bin", ".ini", ".json", ".safetensors"}  # a change of such a file in SRC forbids to go on
UNFINISHED = ".unfinished"
MANIFEST = "conversion.json"  # in DST.partial: which conversion it belongs to
SHARD_BYTES = 5_000_000_000  # the most of one safetensors file, as transformers saves them


@dataclass(frozen=True)
class Settings:
    """One conversion; `weight_data_type` None is the source's own, `context_length` 0 what its files say."""

    source: Path
    target: Path
    to: str
    tensor_para_size: int = 1
    weight_data_type: str | None = None
    context_length: int = 0
    shard_bytes: int = SHARD_BYTES


def parse_settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="directory of either kind, or the parent of a <t>-gpu")
    add("target", type=Path, metavar="DST", help="directory to make; what is not complete stands in DST.partial")
    add("--to", required=True, choices=["fastertransformer", "huggingface"])
    add("--tensor-para-size", type=int, default=1, metavar="T", help="GPUs that share the weights (default: 1)")
    add("--weight-data-type", choices=list(WEIGHT_TYPES), help="default: the source's own")
    add("--context-length", type=int, default=0, metavar="N", help="tokens, where no config.json beside SRC says it")
    return Settings(**vars(parser.parse_args(arguments)))


@contextlib.contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete and on disk."""
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
        """Raw, little-endian, C order."""
        file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        self.bar.update(tensor.nbytes)


def convert(settings: Settings) -> None:
    """Run a conversion; ConfigError says what forbids it, and leaves no DST."""
    target, partial = settings.target, settings.target.with_name(f"{settings.target.name}.partial")
    if settings.source.resolve() == target.resolve():
        raise ConfigError(f"SRC and DST are the same directory, {target}")
    if target.exists():
        raise ConfigError(f"{target} exists already: DST is made, never changed")
    if settings.context_length < 0:
        raise ConfigError(f"--context-length is {settings.context_length}, allowed: 0 or more")
    files = find_checkpoint_files(settings.source)
    config = ModelConfig.read(settings.source, settings.context_length)
    if settings.to == "huggingface" and settings.tensor_para_size != 1:
        raise ConfigError(f"--tensor-para-size is {settings.tensor_para_size}, but Hugging Face's files are not split")
    check_split(config, settings.tensor_para_size)
    source = open_weights(settings.source, config)
    data_type = settings.weight_data_type or source.data_type
    if data_type is None:
        raise ConfigError(f"the weights of {settings.source} are of no type that can be kept: give --weight-data-type")
    partial.mkdir(parents=True, exist_ok=True)
    with hold(partial):
        take_up(partial, settings, files, data_type)
        if settings.to == "fastertransformer":
            write_fastertransformer(partial, source, config, data_type, settings.tensor_para_size)
        else:
            write_huggingface(partial, source, config, data_type, settings.shard_bytes)
        write_companions(partial, files, config, data_type)
        (partial / MANIFEST).unlink()
        for unfinished in partial.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        partial.rename(target)


@contextlib.contextmanager
def hold(partial: Path) -> Iterator[None]:
    """Keeps a second run of the same conversion out."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{partial} is being written by another run") from None
        yield
    finally:
        os.close(descriptor)


def take_up(partial: Path, settings: Settings, files: CheckpointFiles, data_type: str) -> None:
    """Start in an empty directory, or go on where the same conversion of the same files stopped."""
    inputs = [path for path in sorted(files.directory.iterdir()) if path.suffix in INPUT_SUFFIXES]
    this = {
        "source": str(files.directory.resolve()),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in inputs},
        "to": settings.to,
        "tensor_para_size": settings.tensor_para_size,
        "weight_data_type": data_type,
        "context_length": settings.context_length,
        "shard_bytes": settings.shard_bytes,
    }
    manifest = partial / MANIFEST
    if all(path.suffix == UNFINISHED for path in partial.iterdir()):
        with create(manifest) as file:
            file.write(json.dumps(this).encode())
    elif not manifest.is_file() or json.loads(manifest.read_text(encoding="utf-8")) != this:
        raise ConfigError(f"{partial} holds another conversion, or SRC has changed since: remove it")


def read(source: WeightSource, tensor: TensorSpec, data_type: str) -> Tensor:
    """The whole tensor as `data_type`; ConfigError where that type cannot hold a value."""
    whole = torch.empty(tensor.shape, dtype=WEIGHT_TYPES[data_type].dtype)
    source.copy(tensor.name, whole)
    # Two numbers, NaN where there is one in the tensor; isfinite would make a tensor of its own.
    if not all(math.isfinite(extreme) for extreme in whole.aminmax()):
        raise ConfigError(f"{tensor.name} has values that {data_type} cannot hold")
    return whole


def write_fastertransformer(
    partial: Path, source: WeightSource, config: ModelConfig, data_type: str, tensor_para_size: int
) -> None:
    """config.ini and model.*.bin, a file for each part of a tensor."""
    tensors = model_tensors(config).values()
    metas = [torch.empty(tensor.shape, dtype=WEIGHT_TYPES[data_type].dtype, device="meta") for tensor in tensors]
    writer = Writer(partial, sum(meta.nbytes for meta in metas))
    with writer.bar:
        for tensor, meta in zip(tensors, metas, strict=True):
            names = part_files(tensor, tensor_para_size)
            sizes = [part.numel() * part.itemsize for part in tensor.parts(meta, tensor_para_size)]
            missing = [name for name, size in zip(names, sizes, strict=True) if not writer.has(name, size)]
            whole = read(source, tensor, data_type) if missing else meta
            for name, part in zip(names, tensor.parts(whole, tensor_para_size), strict=True):
                if name in missing:
                    with create(partial / name) as file:
                        writer.write_tensor(file, part)
    ini = configparser.ConfigParser(interpolation=None)
    ini["gptj"] = {
        "model_name": "gptj",
        **config.to_fastertransformer(),
        "weight_data_type": data_type,
    }
    with (partial / CONFIG_INI).open("w", encoding="utf-8") as text:
        ini.write(text)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, and the tensors of the table whose Hugging Face tensors are in it."""

    name: str
    tensors: list[TensorSpec]


def plan_shards(config: ModelConfig, item_bytes: int, shard_bytes: int) -> list[Shard]:
    """Tensors in their order, as many to a file as `shard_bytes` hold, one at least."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in model_tensors(config).values():
        tensor_bytes = torch.Size(tensor.shape).numel() * item_bytes
        if groups[-1] and size + tensor_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor_bytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def safetensors_header(shard: Shard, family: ModelFamily, data_type: str) -> tuple[bytes, list[str], int]:
    """The header as it stands in the file, the names of the shard's tensors, and the bytes of their data.

    Written here, because the library wants all tensors of a file in memory. Source: the format's description,
    https://huggingface.co/docs/safetensors.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard.tensors:
        meta = torch.empty(tensor.shape, dtype=WEIGHT_TYPES[data_type].dtype, device="meta")
        for name, views in family.views(tensor.name, meta).items():
            end = offset + sum(view.nbytes for view in views)
            entries[name] = {
                "dtype": WEIGHT_TYPES[data_type].safetensors_name,
                "shape": [sum(len(view) for view in views), *views[0].shape[1:]],
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [name for name in entries if name != "__metadata__"], offset


def write_huggingface(
    partial: Path, source: WeightSource, config: ModelConfig, data_type: str, shard_bytes: int
) -> None:
    """model.safetensors, or its shards and their index."""
    shards = plan_shards(config, WEIGHT_TYPES[data_type].bytes, shard_bytes)
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
                    for views in config.family.views(tensor.name, read(source, tensor, data_type)).values():
                        for view in views:
                            writer.write_tensor(file, view)
    if len(shards) > 1:
        weight_map = {name: shard.name for shard, (_, names, _) in zip(shards, headers, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_companions(partial: Path, files: CheckpointFiles, config: ModelConfig, data_type: str) -> None:
    """config.json, and what the tokenizer is made of."""
    found = files.find("config.json")
    raw = config.to_huggingface() if found is None else json.loads(found.read_text(encoding="utf-8"))
    # Both matrices are written, so nothing is tied any more; older releases of transformers named the type torch_dtype.
    raw.pop("torch_dtype", None)
    raw |= {"dtype": WEIGHT_TYPES[data_type].torch_name, "tie_word_embeddings": False}
    (partial / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        path = files.find(name)
        if path is not None:
            shutil.copyfile(path, partial / name)


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse_settings(arguments)
    try:
        convert(settings)
    except (ConfigError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0
