"""What --model may be: a directory, a hub id, and checkpoints without tokenizer.json."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.project import PROJECT
from gptj_triton.serving.checkpoint import Checkpoint, ModelRequest, find_checkpoint
from gptj_triton.serving.errors import ServeError
from gptj_triton.text.tokenizer import PromptTokenizer

EMBEDDED = PROJECT / "model_repository" / "fastertransformer" / "1" / "storyteller"
STAGING = Path("/nowhere/staging")  # of a checkpoint that needs none
TEXT = "Once upon a time,  there was a fox; he said:\n\t‘Émile!’ 🦊 don't<|endoftext|>"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def slow_tokenizer(tmp_path: Path) -> Path:
    """The embedded checkpoint's configuration, with vocab.json and merges.txt instead of tokenizer.json."""
    folder = tmp_path / "slow"
    folder.mkdir()
    shutil.copy(EMBEDDED / "config.json", folder)
    model = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    vocab = {
        **model["vocab"],
        "<|endoftext|>": Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")).token_to_id("<|endoftext|>"),
    }
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


def test_without_a_model_the_embedded_one_is_served() -> None:
    assert find_checkpoint(ModelRequest(), EMBEDDED, STAGING) == Checkpoint(EMBEDDED, EMBEDDED)


def test_a_relative_directory_becomes_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EMBEDDED.parent)
    assert find_checkpoint(ModelRequest("storyteller"), EMBEDDED, STAGING) == Checkpoint(EMBEDDED, EMBEDDED)


@pytest.mark.parametrize("model", ["/no/such/place", "./no-such", "a/b/c", "~/x", ""])
def test_what_is_no_directory_and_no_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ServeError, match=f"--model {model}: no such directory"):
        find_checkpoint(ModelRequest(model), EMBEDDED, STAGING)


def test_a_directory_that_is_a_file_or_empty_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ServeError, match=r"--model .*/empty is an empty directory: no config\.json and no config\.ini"):
        find_checkpoint(ModelRequest(str(tmp_path / "empty")), EMBEDDED, STAGING)
    for option, request in (
        ("--model", ModelRequest(str(tmp_path / "weights.bin"))),
        ("--tokenizer", ModelRequest(None, str(tmp_path / "weights.bin"))),
    ):
        with pytest.raises(ServeError, match=f"{option} .*weights.bin: a file, expected the directory"):
            find_checkpoint(request, EMBEDDED, tmp_path / "staging")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_git_lfs_pointer_beside_the_weights_or_in_a_tokenizers_directory_is_called_that(
    name: str, slow_tokenizer: Path, tmp_path: Path
) -> None:
    (slow_tokenizer / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ServeError, match=f"--model .*/{name} is a Git LFS pointer, .*: run `git lfs pull` in .*/slow"):
        find_checkpoint(ModelRequest(str(slow_tokenizer)), EMBEDDED, STAGING)
    if name != "config.json":  # a tokenizer's directory needs none
        with pytest.raises(ServeError, match=f"--tokenizer .*/{name} is a Git LFS pointer"):
            find_checkpoint(ModelRequest(None, str(slow_tokenizer)), EMBEDDED, tmp_path / "staging")


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"no config\.json"):
        find_checkpoint(ModelRequest(str(tmp_path)), EMBEDDED, STAGING)


def test_a_checkpoint_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    with pytest.raises(ServeError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        find_checkpoint(ModelRequest(str(tmp_path)), EMBEDDED, STAGING)


def test_vocab_and_merges_make_the_same_tokenizer(slow_tokenizer: Path) -> None:
    checkpoint = find_checkpoint(ModelRequest(str(slow_tokenizer)), EMBEDDED, STAGING)
    assert checkpoint.weights == slow_tokenizer
    assert checkpoint.tokenizer != slow_tokenizer
    assert (checkpoint.tokenizer / "config.json").read_bytes() == (EMBEDDED / "config.json").read_bytes()
    made = Tokenizer.from_file(str(checkpoint.tokenizer / "tokenizer.json"))
    embedded = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    assert made.encode(TEXT).ids == embedded.encode(TEXT).ids


def test_a_tokenizer_is_made_once_and_again_when_its_sources_change(slow_tokenizer: Path) -> None:
    first = find_checkpoint(ModelRequest(str(slow_tokenizer)), EMBEDDED, STAGING).tokenizer / "tokenizer.json"
    made = first.stat().st_mtime_ns
    assert find_checkpoint(ModelRequest(str(slow_tokenizer)), EMBEDDED, STAGING).tokenizer == first.parent
    assert first.stat().st_mtime_ns == made
    (slow_tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    assert find_checkpoint(ModelRequest(str(slow_tokenizer)), EMBEDDED, STAGING).tokenizer != first.parent


def test_a_broken_vocabulary_is_one_line(slow_tokenizer: Path) -> None:
    (slow_tokenizer / "vocab.json").write_text("{")
    with pytest.raises(
        ServeError, match=f"--model {slow_tokenizer}: no tokenizer can be made of merges.txt, vocab.json: "
    ):
        find_checkpoint(ModelRequest(str(slow_tokenizer)), EMBEDDED, STAGING)


@pytest.fixture
def nvidias(make_checkpoint: Callable[..., Path], write_fastertransformer: Callable[..., Path], tmp_path: Path) -> Path:
    """The parent of a 2-gpu as NVIDIA's converter leaves it: neither config.json nor tokenizer."""
    shape = {"n_embd": 32, "n_head": 2, "rotary_dim": 8, "n_layer": 1, "n_positions": 64, "vocab_size": 4096}
    return write_fastertransformer(make_checkpoint(**shape), tmp_path / "nvidias" / "2-gpu", 2).parent


def test_a_fastertransformer_directory_with_all_beside_it_needs_no_option(nvidias: Path, tmp_path: Path) -> None:
    (nvidias / "config.json").write_text(json.dumps({**read_config(nvidias), "n_positions": 64}))
    shutil.copy(EMBEDDED / "tokenizer.json", nvidias / "2-gpu")
    for model in (nvidias, nvidias / "2-gpu"):
        staging = tmp_path / f"staging of {model.name}"
        checkpoint = find_checkpoint(ModelRequest(str(model)), EMBEDDED, staging)
        assert checkpoint == Checkpoint(nvidias / "2-gpu", staging, None)
        assert read_json(staging / "config.json")["n_positions"] == 64
        assert_embedded_tokenizer(staging)


def assert_embedded_tokenizer(folder: Path) -> None:
    found, embedded = (Tokenizer.from_file(str(each / "tokenizer.json")) for each in (folder, EMBEDDED))
    assert found.get_vocab() == embedded.get_vocab()
    assert found.encode(TEXT).ids == embedded.encode(TEXT).ids


def test_what_a_fastertransformer_directory_lacks_is_asked_for_by_its_option(nvidias: Path, tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    with pytest.raises(ServeError, match=r"no tokenizer\.json beside it: give --tokenizer$"):
        find_checkpoint(ModelRequest(str(nvidias)), EMBEDDED, staging)
    find_checkpoint(ModelRequest(str(nvidias), str(EMBEDDED)), EMBEDDED, tmp_path / "unnamed")
    assert read_json(tmp_path / "unnamed" / "config.json")["n_positions"] == 2048
    request = ModelRequest(str(nvidias), str(EMBEDDED), 48)
    assert find_checkpoint(request, EMBEDDED, staging) == Checkpoint(nvidias / "2-gpu", staging, 48)
    staged = read_json(staging / "config.json")
    assert (staged["n_positions"], staged["vocab_size"], staged["eos_token_id"]) == (48, 4096, 256)
    assert_embedded_tokenizer(staging)


def test_a_hugging_face_directory_takes_another_tokenizer_too(slow_tokenizer: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(ModelRequest(None, str(slow_tokenizer)), EMBEDDED, tmp_path / "staging")
    assert checkpoint == Checkpoint(EMBEDDED, tmp_path / "staging", None)
    made = Tokenizer.from_file(str(tmp_path / "staging" / "tokenizer.json"))
    assert made.encode(TEXT).ids == Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")).encode(TEXT).ids


def test_options_that_contradict_the_checkpoint_are_refused(nvidias: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"context_length is 48, but .*config\.json says 1024"):
        find_checkpoint(ModelRequest(context_length=48), EMBEDDED, tmp_path / "staging")
    with pytest.raises(ServeError, match="--tokenizer /no/such: no such directory"):
        find_checkpoint(ModelRequest(str(nvidias), "/no/such", 48), EMBEDDED, tmp_path / "staging")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(ServeError, match=r"--tokenizer .*broken: no tokenizer can be made of tokenizer\.json: "):
        find_checkpoint(ModelRequest(str(nvidias), str(tmp_path / "broken"), 48), EMBEDDED, tmp_path / "staging")


def test_a_tokenizer_may_have_more_tokens_than_the_model(nvidias: Path, tmp_path: Path) -> None:
    small = (nvidias / "2-gpu" / "config.ini").read_text().replace("vocab_size = 4096", "vocab_size = 4095")
    (nvidias / "2-gpu" / "config.ini").write_text(small)
    find_checkpoint(ModelRequest(str(nvidias), str(EMBEDDED), 48), EMBEDDED, tmp_path / "staging")
    assert_embedded_tokenizer(tmp_path / "staging")
    shutil.copy(EMBEDDED / "tokenizer.json", nvidias)
    find_checkpoint(ModelRequest(str(nvidias), None, 48), EMBEDDED, tmp_path / "beside")
    assert_embedded_tokenizer(tmp_path / "beside")


def test_all_end_ids_reach_preprocessing(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [0, 225]}')
    made = find_checkpoint(ModelRequest(str(tmp_path / "model")), EMBEDDED, STAGING).tokenizer
    staged = find_checkpoint(ModelRequest(str(tmp_path / "model"), context_length=1024), EMBEDDED, tmp_path / "staged")
    for folder in (made, staged.tokenizer):
        assert PromptTokenizer.load(folder).end_ids == (0, 225)


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def read_config(nvidias: Path) -> dict[str, Any]:
    return ModelConfig.from_fastertransformer(nvidias / "2-gpu" / "config.ini", 1, 1e-5).to_huggingface()


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download needs, for one repository of small files."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, *arguments: Any, files: dict[str, bytes], asked: list[str]) -> None:
        self.files, self.asked = files, asked
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        _, _, name = path.partition("/resolve/" + self.commit + "/")
        if path.startswith("/api/models/project/tiny/revision/"):
            siblings = [{"rfilename": file} for file in self.files]
            body = json.dumps({"id": "project/tiny", "sha": self.commit, "siblings": siblings}).encode()
        elif path == "/api/models/project/tiny/tree/" + self.commit:
            entries = [{"type": "file", "path": file, "oid": "0", "size": 2} for file in self.files]
            body = json.dumps(entries).encode()
        elif name in self.files:
            self.asked.append(name)
            body = self.files[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A hub on this machine: its URL, its files by name (to be filled), and the names that were asked for."""
    files: dict[str, bytes] = {}
    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, files=files, asked=asked)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", files, asked
        server.shutdown()
        thread.join()


def find_on(hub_url: str, home: Path, hub_id: str) -> subprocess.CompletedProcess[str]:
    """Runs find_checkpoint in a process of its own: the hub's client reads its environment when it is imported."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from gptj_triton.serving.checkpoint import ModelRequest, find_checkpoint\n"
        "nowhere = Path('/nowhere')\nprint(find_checkpoint(ModelRequest(sys.argv[1]), nowhere, nowhere).weights)"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(home)}
    command = [sys.executable, "-c", code, hub_id]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("weights", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin"], {"model.safetensors"}),
        (["pytorch_model.bin"], {"pytorch_model.bin"}),
    ],
)
def test_of_a_hub_model_only_what_is_needed_is_fetched(
    hub: tuple[str, dict[str, bytes], list[str]], tmp_path: Path, weights: list[str], fetched: set[str]
) -> None:
    url, files, asked = hub
    needed = ["config.json", "tokenizer.json"]
    files.update({name: (EMBEDDED / name).read_bytes() for name in needed})
    files.update(dict.fromkeys([*weights, "tf_model.h5", "flax_model.msgpack", "README.md"], b"{}"))
    done = find_on(url, tmp_path, "project/tiny")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path(done.stdout.strip()).iterdir()} == {*needed, *fetched}
    assert set(asked) == {*needed, *fetched}


def test_an_unknown_hub_model_is_named(hub: tuple[str, dict[str, bytes], list[str]], tmp_path: Path) -> None:
    done = find_on(hub[0], tmp_path, "project/unknown")
    assert done.returncode == 1
    assert "ServeError: --model project/unknown: neither a directory nor to be had from the hub: " in done.stderr
