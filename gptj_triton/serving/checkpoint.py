"""Turns `--model`, `--tokenizer` and `--context-length` into two local directories: one with the weights, and one with
config.json and tokenizer.json for preprocessing and postprocessing. Does not open the weights: the engine does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from gptj_triton.checkpoint.files import CheckpointFiles, find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.errors import ConfigError
from gptj_triton.serving.errors import ServeError
from gptj_triton.stand_ins import refuse_stand_in
from gptj_triton.text.tokenizer_files import NEIGHBOURS, SETTINGS

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SMALL_FILES = ["*.json", "merges.txt"]
# The files of which transformers makes a tokenizer: tokenizer.json, or these two, and what stands beside them.
MERGES = ("vocab.json", "merges.txt")
TOKENIZER_SOURCES = ("tokenizer.json", *MERGES, *NEIGHBOURS)
CONFIGS = ("config.json", "generation_config.json")


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
        if request.tokenizer is None:
            refuse_tokenizer_stand_ins(files)
    except ConfigError as error:
        raise ServeError(f"--model {error}") from None
    if not files.is_fastertransformer and not os.path.lexists(folder / "config.json"):
        raise ServeError(
            f"--model {folder}: no config.json in it, so this is no Hugging Face directory, and no config.ini, "
            "so it is not FasterTransformer's either"
        )
    try:
        config = ModelConfig.read(files.directory, request.context_length or 0)
    except ConfigError as error:
        raise ServeError(f"--model {files.directory}: {error}") from None
    if files.is_fastertransformer or request.tokenizer is not None or request.context_length is not None:
        stage_tokenizer(files, config, request, staging)
        return Checkpoint(files.directory, staging, request.context_length)
    # A test says that transformers uses the embedded tokenizer.json as it is, so nothing needs to be made.
    return Checkpoint(folder, folder if folder == embedded else make_tokenizer(folder, f"--model {folder}"))


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


def stage_tokenizer(files: CheckpointFiles, config: ModelConfig, request: ModelRequest, staging: Path) -> None:
    """Write to `staging` the tokenizer.json, and a config.json with the checkpoint's values and the user's."""
    where = f"--model {files.directory}"
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
    made = make_tokenizer(source, where, config)
    staging.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made / name, staging)
    (staging / "config.json").write_text(json.dumps(config.to_huggingface(), indent=2), encoding="utf-8")


def refuse_tokenizer_stand_ins(files: CheckpointFiles) -> None:
    """Raise ConfigError where a file that the tokenizer is read from is a Git LFS pointer or a link to nothing."""
    found = {name: path for name in TOKENIZER_SOURCES if (path := files.find(name)) is not None}
    for name, path in found.items():
        if name not in MERGES or "tokenizer.json" not in found:
            refuse_stand_in(path)


def cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache.absolute() / "gptj-triton" / "tokenizers"


def make_tokenizer(folder: Path, where: str, model: ModelConfig | None = None) -> Path:
    """Make a directory with the tokenizer.json that `transformers` would use where it is given `folder`.

    It is made of all files there that have a say: transformers changes a tokenizer.json by what the others say. `model`
    says the family where `folder` has no config.json. The directory has the folder's config.json and
    generation_config.json too, if they are there, and is kept for later runs. ServeError begins with `where`.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if "tokenizer.json" not in names and not set(MERGES) <= names:
        raise ServeError(f"{where}: needs tokenizer.json, or vocab.json and merges.txt")
    sources = {name: (folder / name).read_bytes() for name in (*TOKENIZER_SOURCES, *CONFIGS) if name in names}
    if model is not None:
        sources.setdefault("config.json", json.dumps(model.to_huggingface()).encode())
    digest = hashlib.sha256(version("transformers").encode())
    for name, data in sources.items():
        digest.update(b"\0" + name.encode() + b"\0" + hashlib.sha256(data).digest())
    made = cache_folder() / digest.hexdigest()[:16]
    if made.is_dir():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as temporary:
        copied, partial = Path(temporary, "sources"), Path(temporary, "made")
        copied.mkdir()
        for name, data in sources.items():
            (copied / name).write_bytes(data)
        partial.mkdir()
        write_tokenizer(copied, partial, where)
        for name in CONFIGS:
            if name in sources:
                shutil.copy(copied / name, partial)
        with contextlib.suppress(OSError):  # another run may have been faster
            partial.rename(made)
    return made


def write_tokenizer(sources: Path, target: Path, where: str) -> None:
    """Write the tokenizer of `sources` as one tokenizer.json, and what that cannot hold as tokenizer_config.json."""
    # Imported here: it takes seconds, which a tokenizer that is kept does not need.
    from transformers import AutoTokenizer, GPT2Tokenizer

    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(sources, local_files_only=True, trust_remote_code=False)
        except Exception:
            if (sources / "tokenizer.json").is_file():
                raise
            # The class that tokenizer_config.json names may not know vocab.json and merges.txt, which are GPT-2's.
            tokenizer = GPT2Tokenizer.from_pretrained(sources, local_files_only=True)
    except Exception as error:  # the library raises nothing more exact
        names = ", ".join(sorted(path.name for path in sources.iterdir() if path.name not in CONFIGS))
        raise ServeError(f"{where}: no tokenizer can be made of {names}: {error}") from None
    backend = tokenizer.backend_tokenizer
    made = json.loads(backend.to_str())
    # The library goes on to drop a special token from texts where another file says that it is none, and writes it as
    # that file says.
    for token in made["added_tokens"]:
        token["special"] = not backend.decode([token["id"]], skip_special_tokens=True)
    (target / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    rest = {name: getattr(tokenizer, name) for name in SETTINGS if getattr(tokenizer, name)}
    rest["tokenizer_class"] = "PreTrainedTokenizerFast"  # its meaning: tokenizer.json as it is
    (target / "tokenizer_config.json").write_text(json.dumps(rest), encoding="utf-8")
