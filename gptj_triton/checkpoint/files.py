"""Finds the parts of a checkpoint: which kind a directory is, where its weights are, and the files beside them.

Opens no file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SPLIT_DIRECTORY = re.compile(r"(\d+)-gpu")  # FasterTransformer's name for weights split for that many GPUs
CONFIG_INI = "config.ini"
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
        return next((place / name for place in places if (place / name).is_file()), None)


def find_checkpoint_files(path: Path) -> CheckpointFiles:
    """The checkpoint at `path`, a directory of either kind or the parent of FasterTransformer's `<t>-gpu` directories.

    Of several splits the smallest is taken. Any other directory counts as Hugging Face's, whose reader says what it
    lacks.
    """
    if (path / CONFIG_INI).is_file():
        return CheckpointFiles(path, is_fastertransformer=True)
    names = [f"{name}{end}" for name in HUGGINGFACE_WEIGHTS for end in ("", ".index.json")]
    splits = {}
    if not any((path / name).exists() for name in names):
        for file in path.glob(f"*/{CONFIG_INI}"):
            if match := SPLIT_DIRECTORY.fullmatch(file.parent.name):
                splits[int(match[1])] = file.parent
    if splits:
        return CheckpointFiles(splits[min(splits)], is_fastertransformer=True)
    return CheckpointFiles(path, is_fastertransformer=False)
