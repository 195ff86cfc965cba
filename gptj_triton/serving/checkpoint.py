"""Turns `--model`, `--tokenizer` and `--context-length` into two local directories: one with the weights, and one with
config.json and tokenizer.json for preprocessing and postprocessing. Does not open the weights: the engine does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.checkpoint.files import CheckpointFiles, find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.errors import ConfigError
from gptj_triton.serving.errors import ServeError
from gptj_triton.stand_ins import refuse_stand_in

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SMALL_FILES = ["*.json", "vocab.json", "merges.txt"]
# The files of which transformers makes a tokenizer; only the first two are needed.
MERGES = ("vocab.json", "merges.txt")
TOKENIZER_SOURCES = (*MERGES, "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelRequest:
    """The user's options; None means the embedded model, the model's own tokenizer and its own context length."""

    model: str | None = None
    tokenizer: str | None = None
    context_length: int | None = None  # tokens


@dataclass(frozen=True)
class Checkpoint:
    """Absolute directories: `weights` has the weights, `tokenizer` has tokenizer.json and config.json.

    `context_length` in tokens is None where the files beside the weights say it.
    """

    weights: Path
    tokenizer: Path
    context_length: int | None = None


def find_checkpoint(request: ModelRequest, embedded: Path, staging: Path) -> Checkpoint:
    """The checkpoint of the request, or `embedded` where it names none; ServeError names what is missing.

    `staging` becomes the tokenizer directory of a FasterTransformer checkpoint, and of one whose tokenizer or context
    length the user gives.
    """
    folder = embedded if request.model is None else find_folder(request.model, "--model")
    try:
        files = find_checkpoint_files(folder)
        refuse_stand_in(files.find("config.json") or folder)
        if request.tokenizer is None:
            refuse_tokenizer_stand_ins(files)
    except ConfigError as error:
        raise ServeError(f"--model {error}") from None
    if files.is_fastertransformer or request.tokenizer is not None or request.context_length is not None:
        stage_tokenizer(files, request, staging)
        return Checkpoint(files.directory, staging, request.context_length)
    if not (folder / "config.json").is_file():
        raise ServeError(
            f"--model {folder}: no config.json in it, so this is no Hugging Face directory, and no config.ini, "
            "so it is not FasterTransformer's either"
        )
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return Checkpoint(folder, folder if has_tokenizer else make_tokenizer(folder, f"--model {folder}"))


def find_folder(name: str, option: str) -> Path:
    """The directory or hub id that an option names, as an absolute directory."""
    if name and Path(name).is_dir():
        return Path(name).absolute()
    if name and Path(name).is_file():
        raise ServeError(f"{option} {name}: a file, expected the directory that has it")
    if HUB_ID.fullmatch(name):
        return download(name, option).absolute()
    raise ServeError(f"{option} {name}: no such directory")


def download(hub_id: str, option: str) -> Path:
    """Download a hub's model to the local cache of huggingface_hub, and return its directory there.

    It has the configuration, the tokenizer and, for the option --model, one kind of weights.
    """
    # Imported here: most runs need no hub, and the import takes half a second.
    from huggingface_hub import snapshot_download

    try:
        if option != "--model":
            return Path(snapshot_download(hub_id, allow_patterns=SMALL_FILES))
        folder = Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, "model*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
    # The hub's client raises its own errors, those of its HTTP library, OSError and ValueError.
    except Exception as error:
        raise ServeError(f"{option} {hub_id}: neither a directory nor to be had from the hub: {error}") from None
    return folder


def stage_tokenizer(files: CheckpointFiles, request: ModelRequest, staging: Path) -> None:
    """Write to `staging` the tokenizer.json, and a config.json with the checkpoint's values and the user's."""
    where = f"--model {files.directory}"
    try:
        config = ModelConfig.read(files.directory, request.context_length or 0)
    except ConfigError as error:
        raise ServeError(f"{where}: {error}") from None
    if request.tokenizer is None:
        found = files.find("tokenizer.json")
        if found is None and any(files.find(name) is None for name in MERGES):
            raise ServeError(f"{where}: no tokenizer.json beside it: give --tokenizer")
        source = (found or files.find(MERGES[0]) or files.directory).parent
    else:
        where = f"--tokenizer {request.tokenizer}"
        source = find_folder(request.tokenizer, "--tokenizer")
        try:
            refuse_tokenizer_stand_ins(CheckpointFiles(source, is_fastertransformer=False))
        except ConfigError as error:
            raise ServeError(f"--tokenizer {error}") from None
    if not (source / "tokenizer.json").is_file():
        source = make_tokenizer(source, where)
    check_vocabulary(source / "tokenizer.json", config.vocab_size, where)
    staging.mkdir(parents=True)
    shutil.copy(source / "tokenizer.json", staging)
    (staging / "config.json").write_text(json.dumps(config.to_huggingface(), indent=2), encoding="utf-8")


def refuse_tokenizer_stand_ins(files: CheckpointFiles) -> None:
    """Raise ConfigError where a file that the tokenizer is read from is a Git LFS pointer or a link to nothing."""
    found = {name: path for name in ("tokenizer.json", *TOKENIZER_SOURCES) if (path := files.find(name)) is not None}
    for name, path in found.items():
        if name not in MERGES or "tokenizer.json" not in found:
            refuse_stand_in(path)


def check_vocabulary(path: Path, vocab_size: int, where: str) -> None:
    """Raise ServeError where a tokenizer has ids that the model lacks."""
    # Imported here: only a tokenizer from elsewhere needs the check.
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise ServeError(f"{where}: {path} is no tokenizer: {error}") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise ServeError(f"{where}: the tokenizer has the id {largest}, but the model's vocabulary is {vocab_size}")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptj-triton" / "tokenizers"


def make_tokenizer(folder: Path, where: str) -> Path:
    """Make a directory with the tokenizer.json that transformers builds from vocab.json and merges.txt.

    It has the config.json of `folder` too, if there is one, and is kept for later runs.
    """
    present = [folder / name for name in TOKENIZER_SOURCES if (folder / name).is_file()]
    if not set(MERGES) <= {path.name for path in present}:
        raise ServeError(f"{where}: needs tokenizer.json, or vocab.json and merges.txt")
    configs = [path for path in [folder / "config.json"] if path.is_file()]
    digest = hashlib.sha256()
    for path in [*present, *configs]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    made = cache_folder() / digest.hexdigest()[:16]
    if (made / "tokenizer.json").is_file() and all((made / path.name).is_file() for path in configs):
        return made
    # Imported here: it takes seconds, and a checkpoint with a tokenizer.json does not need it.
    from transformers import GPT2TokenizerFast

    try:
        tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise ServeError(f"{where}: vocab.json and merges.txt make no tokenizer: {error}") from None
    made.mkdir(parents=True, exist_ok=True)
    for path in configs:
        shutil.copy(path, made)
    tokenizer.backend_tokenizer.save(str(made / "tokenizer.json"))
    return made
