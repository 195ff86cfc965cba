"""One conversion from start to end. All is written to DST.partial, which becomes DST when it is complete.

After a kill, the same conversion goes on behind the last file that was finished. Reads through the engine's own
sources; knows nothing of Triton.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.checkpoint.convert.fastertransformer import write_fastertransformer
from gptj_triton.checkpoint.convert.huggingface import SHARD_BYTES, write_huggingface
from gptj_triton.checkpoint.convert.output import UNFINISHED, create
from gptj_triton.checkpoint.data_types import WEIGHT_TYPES, DataType
from gptj_triton.checkpoint.files import CheckpointFiles, find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import check_split
from gptj_triton.checkpoint.weights import open_weights
from gptj_triton.errors import ConfigError
from gptj_triton.stand_ins import refuse_stand_in
from gptj_triton.text.json_files import read_object

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "generation_config.json"),
)
INPUT_SUFFIXES = {".bin", ".ini", ".json", ".safetensors"}  # a conversion does not go on when such a file has changed
MANIFEST = "conversion.json"  # in DST.partial: which conversion it belongs to


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
    for path in filter(None, map(files.find, COMPANIONS)):
        refuse_stand_in(path)
    config = ModelConfig.read(settings.source, settings.context_length)
    if settings.to == "huggingface" and settings.tensor_para_size != 1:
        raise ConfigError(f"--tensor-para-size is {settings.tensor_para_size}, but Hugging Face's files are not split")
    check_split(config, settings.tensor_para_size)
    source = open_weights(settings.source, config)
    name = settings.weight_data_type or source.data_type
    if name is None:
        raise ConfigError(f"the weights of {settings.source} are of no type that can be kept: give --weight-data-type")
    data_type = WEIGHT_TYPES[name]
    partial.mkdir(parents=True, exist_ok=True)
    with lock(partial):
        start_or_resume(partial, settings, files, data_type)
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
def lock(partial: Path) -> Iterator[None]:
    """Keep a second run of the same conversion out."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{partial} is being written by another run") from None
        yield
    finally:
        os.close(descriptor)


def start_or_resume(partial: Path, settings: Settings, files: CheckpointFiles, data_type: DataType) -> None:
    """Start in an empty directory, or go on where the same conversion of the same files stopped."""
    inputs = [path for path in sorted(files.directory.iterdir()) if path.suffix in INPUT_SUFFIXES]
    this = {
        "source": str(files.directory.resolve()),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in inputs},
        "to": settings.to,
        "tensor_para_size": settings.tensor_para_size,
        "weight_data_type": data_type.name,
        "context_length": settings.context_length,
        "shard_bytes": settings.shard_bytes,
    }
    manifest = partial / MANIFEST
    if all(path.suffix == UNFINISHED for path in partial.iterdir()):
        with create(manifest) as file:
            file.write(json.dumps(this).encode())
    elif not manifest.is_file() or json.loads(manifest.read_text(encoding="utf-8")) != this:
        raise ConfigError(f"{partial} holds another conversion, or SRC has changed since: remove it")


def write_companions(partial: Path, files: CheckpointFiles, config: ModelConfig, data_type: DataType) -> None:
    """Write config.json, and copy the tokenizer's files."""
    found = files.find("config.json")
    raw = config.to_huggingface() if found is None else read_object(found)
    # Both matrices are written, so nothing is tied any more; older releases of transformers named the type torch_dtype.
    raw.pop("torch_dtype", None)
    raw |= {"dtype": data_type.torch_name, "tie_word_embeddings": False}
    (partial / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        path = files.find(name)
        if path is not None:
            shutil.copyfile(path, partial / name)
