"""Turns `--model` into a local directory with config.json and weights, and one with tokenizer.json. Does not look into
the weights: the engine does, when it loads them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from serving.errors import ServeError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SMALL_FILES = ["*.json", "vocab.json", "merges.txt"]
# What transformers reads to make a tokenizer, where a checkpoint has it.
MERGES = ("vocab.json", "merges.txt")
TOKENIZER_SOURCES = (*MERGES, "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """Absolute directories: `weights` has the weights, `tokenizer` has tokenizer.json, and both have config.json."""

    weights: Path
    tokenizer: Path


def find_checkpoint(model: str | None, embedded: Path) -> Checkpoint:
    """The directory or hub id `model`, the `embedded` directory where it is None; ServeError names what is missing."""
    if model is None:
        folder = embedded
    elif model and Path(model).is_dir():
        folder = Path(model)
    elif HUB_ID.fullmatch(model):
        folder = download(model)
    else:
        raise ServeError(f"--model {model}: no such directory")
    folder = folder.absolute()
    if not (folder / "config.json").is_file():
        raise ServeError(f"--model {folder}: no config.json in it, so this is no Hugging Face directory")
    return Checkpoint(folder, folder if (folder / "tokenizer.json").is_file() else make_tokenizer(folder))


def download(hub_id: str) -> Path:
    """The hub's model in the local cache of huggingface_hub: configuration, tokenizer and one kind of weights."""
    # Imported here: most runs need no hub, and the import takes half a second.
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, "model*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
    # The hub's client raises its own errors, those of its HTTP library, OSError and ValueError.
    except Exception as error:
        raise ServeError(f"--model {hub_id}: neither a directory nor to be had from the hub: {error}") from None
    return folder


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptj-triton" / "tokenizers"


def make_tokenizer(folder: Path) -> Path:
    """A directory with the tokenizer.json that transformers makes of vocab.json and merges.txt, kept for later runs."""
    present = [folder / name for name in TOKENIZER_SOURCES if (folder / name).is_file()]
    if not set(MERGES) <= {path.name for path in present}:
        raise ServeError(f"--model {folder}: needs tokenizer.json, or vocab.json and merges.txt")
    digest = hashlib.sha256()
    for path in [*present, folder / "config.json"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    made = cache_folder() / digest.hexdigest()[:16]
    if (made / "tokenizer.json").is_file() and (made / "config.json").is_file():
        return made
    # Imported here: it takes seconds, and a checkpoint with a tokenizer.json does not need it.
    from transformers import GPT2TokenizerFast

    try:
        tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise ServeError(f"--model {folder}: vocab.json and merges.txt make no tokenizer: {error}") from None
    made.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "config.json", made)
    tokenizer.backend_tokenizer.save(str(made / "tokenizer.json"))
    return made
