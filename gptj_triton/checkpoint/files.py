"""Finds the parts of a checkpoint: which kind a directory is, where its weights are, and the files beside them.

Opens no file. A directory that cannot hold a checkpoint is refused here, for everyone who names one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.errors import ConfigError

SPLIT_DIRECTORY = re.compile(r"(\d+)-gpu")  # FasterTransformer's name for weights split for that many GPUs
CONFIG_INI = "config.ini"
FASTERTRANSFORMER_WEIGHTS = "model.wte.bin"  # one of many
HUGGINGFACE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class CheckpointFiles:
    """`directory` has the weights: FasterTransformer's `config.ini` and `model.*.bin`, else Hugging Face's files."""

    directory: Path
    is_fastertransformer: bool

    def find(self, name: str) -> Path | None:
        """The file `name` beside the weights or, where their directory is a `<t>-gpu`, in its parent."""
        places = [self.directory]
        if self.is_fastertransformer and SPLIT_DIRECTORY.fullmatch(self.directory.absolute().name):
            places.append(self.directory.absolute().parent)
        return next((place / name for place in places if os.path.lexists(place / name)), None)


def find_checkpoint_files(path: Path) -> CheckpointFiles:
    """The checkpoint at `path`, a directory of either kind or the parent of FasterTransformer's `<t>-gpu` directories.

    Of several splits the smallest is taken. Any other directory counts as Hugging Face's, whose reader says what it
    lacks. ConfigError where `path` is no directory, cannot be read, is empty, or lacks FasterTransformer's config.ini.
    """
    present = _list_directory(path)
    if CONFIG_INI in present:
        return CheckpointFiles(path, is_fastertransformer=True)
    names = {f"{name}{end}" for name in HUGGINGFACE_WEIGHTS for end in ("", ".index.json")}
    splits = {}
    if not names & present:
        for file in path.glob(f"*/{CONFIG_INI}"):
            if match := SPLIT_DIRECTORY.fullmatch(file.parent.name):
                splits[int(match[1])] = file.parent
    if splits:
        return CheckpointFiles(splits[min(splits)], is_fastertransformer=True)
    if FASTERTRANSFORMER_WEIGHTS in present and not names & present:
        raise ConfigError(
            f"{path / CONFIG_INI} is missing; FasterTransformer's {FASTERTRANSFORMER_WEIGHTS} beside it needs one, "
            "with the section [gptj] and the keys head_num, size_per_head, inter_size, num_layer, rotary_embedding, "
            "vocab_size, start_id, end_id and weight_data_type"
        )
    return CheckpointFiles(path, is_fastertransformer=False)


def _list_directory(path: Path) -> set[str]:
    """The names in a directory; ConfigError where it is none, cannot be read, or is empty."""
    try:
        names = set(os.listdir(path))
    except OSError as error:
        if path.is_file():
            reason = "is a file, expected the directory of a checkpoint"
        elif isinstance(error, (FileNotFoundError, NotADirectoryError)):
            reason = "does not exist, expected the directory of a checkpoint"
        else:
            reason = f"cannot be read: {error.strerror}"
        raise ConfigError(f"{path} {reason}") from None
    if not names:
        raise ConfigError(f"{path} is an empty directory: no config.json and no {CONFIG_INI} in it, so no checkpoint")
    return names
