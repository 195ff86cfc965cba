"""The converter: bits kept, one tensor in memory at a time, DST whole or not there, and every nonsense refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTJForCausalLM

from gptj_triton.checkpoint.convert.command import main
from gptj_triton.checkpoint.convert.conversion import Settings, convert
from gptj_triton.checkpoint.data_types import WEIGHT_TYPES
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.weights import load_weights
from gptj_triton.errors import ConfigError
from gptj_triton.project import PROJECT

MakeCheckpoint = Callable[..., Path]
Write = Callable[..., Path]

SCRIPT = PROJECT / "tools" / "convert_checkpoint.py"
THREE_HEADS: dict[str, Any] = {"n_positions": 64}
FOUR_HEADS = {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "vocab_size": 301, "n_positions": 64}
ODD_INNER = {"n_embd": 48, "n_head": 3, "n_inner": 99, "rotary_dim": 16, "n_layer": 1, "vocab_size": 505}
MIB = 2**20


def run(source: Path, target: Path, to: str, ranks: int = 1, data_type: str | None = None, **more: Any) -> Path:
    convert(Settings(source, target, to, ranks, data_type, **more))
    assert not target.with_name(f"{target.name}.partial").exists()
    return target


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def binaries(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("model.*.bin")}


def engine_tensors(checkpoint: Path) -> list[Tensor]:
    weights = load_weights(checkpoint, ModelConfig.read(checkpoint), torch.float32, torch.device("cpu"))
    layers = [tensor for layer in weights.layers for tensor in vars(layer).values()]
    return [*layers, *(value for value in vars(weights).values() if isinstance(value, Tensor))]


@pytest.mark.parametrize("data_type", WEIGHT_TYPES)
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [(THREE_HEADS, 1), (THREE_HEADS, 3), (FOUR_HEADS, 1), (FOUR_HEADS, 2), (FOUR_HEADS, 4), (ODD_INNER, 3)],
)
def test_the_files_are_those_that_nvidias_converter_writes_and_come_back_bit_for_bit(
    shape: dict[str, Any],
    ranks: int,
    data_type: str,
    make_checkpoint: MakeCheckpoint,
    write_fastertransformer: Write,
    tmp_path: Path,
) -> None:
    source = make_checkpoint(**shape)
    target = run(source, tmp_path / "ft", "fastertransformer", ranks, data_type)
    assert binaries(target) == binaries(write_fastertransformer(source, tmp_path / "expected", ranks, data_type))
    assert ModelConfig.read(target) == ModelConfig.read(source)
    back = run(target, tmp_path / "back", "huggingface")
    rounded = {name: tensor.to(WEIGHT_TYPES[data_type].dtype) for name, tensor in tensors_of(source).items()}
    assert_equal(tensors_of(back), rounded)
    if data_type == "fp32":
        for got, expected in zip(engine_tensors(target), engine_tensors(source), strict=True):
            assert torch.equal(got, expected)


def test_a_codegen_becomes_the_files_of_a_gptj_with_its_weights_and_comes_back_bit_for_bit(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("CodeGen", **FOUR_HEADS)
    target = run(source, tmp_path / "2-gpu", "fastertransformer", 2)
    back = run(target, tmp_path / "back", "huggingface")
    assert_equal(tensors_of(back), tensors_of(source))
    assert ModelConfig.read(target) == ModelConfig.read(back) == ModelConfig.read(source)
    (target / "config.json").unlink()  # without it the files are those of any GPT-J
    gptj = run(target, tmp_path / "gptj", "huggingface", context_length=64)
    for got, expected in zip(engine_tensors(gptj), engine_tensors(source), strict=True):
        assert torch.equal(got, expected)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        got, expected = (AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits for folder in (gptj, source))
    torch.testing.assert_close(got, expected)


def test_a_split_becomes_another_split_and_then_what_it_was(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(**FOUR_HEADS)
    two = run(source, tmp_path / "two" / "2-gpu", "fastertransformer", 2)
    four = run(two.parent, tmp_path / "4-gpu", "fastertransformer", 4)
    assert binaries(four) == binaries(run(source, tmp_path / "direct", "fastertransformer", 4))
    assert_equal(tensors_of(run(four, tmp_path / "hf", "huggingface")), tensors_of(source))


def test_the_way_there_and_back_leaves_every_logit_as_it_was(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(**FOUR_HEADS, layer_norm_epsilon=1e-3)
    back = run(run(source, tmp_path / "ft", "fastertransformer", 2), tmp_path / "back", "huggingface")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        got, expected = (GPTJForCausalLM.from_pretrained(folder).eval()(ids).logits for folder in (back, source))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("data_type", WEIGHT_TYPES)
def test_transformers_loads_shards_without_a_word(
    data_type: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(**FOUR_HEADS)
    target = run(source, tmp_path / "shards", "huggingface", 1, data_type, shard_bytes=120_000)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 2
    code = (
        "import sys, transformers; model, told = transformers.GPTJForCausalLM.from_pretrained(sys.argv[1], "
        "output_loading_info=True); print(model.dtype, any(told.values()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(target)],
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "info"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{WEIGHT_TYPES[data_type].dtype} False\n"
    assert "not used" not in done.stderr and "newly initialized" not in done.stderr and "UNEXPECTED" not in done.stderr
    rounded = {name: tensor.to(WEIGHT_TYPES[data_type].dtype) for name, tensor in tensors_of(source).items()}
    assert_equal(tensors_of(target), rounded)
    for file in target.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # releases of transformers before 5 demand it


def test_a_type_is_kept_unless_another_is_asked_for(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(**FOUR_HEADS)
    half = run(source, tmp_path / "half", "huggingface", 1, "bf16")
    assert "weight_data_type = bf16" in (run(half, tmp_path / "ft", "fastertransformer") / "config.ini").read_text()


def test_tied_embeddings_become_two_equal_matrices(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tied = shutil.copytree(make_checkpoint(**FOUR_HEADS), tmp_path / "tied")
    tensors = load_file(tied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    back = run(run(tied, tmp_path / "ft", "fastertransformer", 2), tmp_path / "back", "huggingface")
    assert_equal(tensors_of(back), tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_tokenizers_files_and_config_json_travel_along(
    make_checkpoint: MakeCheckpoint, write_fastertransformer: Write, tmp_path: Path
) -> None:
    source = make_checkpoint(**FOUR_HEADS)
    split = write_fastertransformer(source, tmp_path / "source" / "2-gpu", 2)
    shutil.copy(source / "config.json", split.parent)
    for name in ("tokenizer.json", "merges.txt", "vocab.json", "tokenizer_config.json"):
        (split.parent / name).write_text(name)
    target = run(split, tmp_path / "target", "fastertransformer", 4)
    for name in ("tokenizer.json", "merges.txt", "vocab.json", "tokenizer_config.json"):
        assert (target / name).read_text() == name
    expected = json.loads((source / "config.json").read_text())
    assert json.loads((target / "config.json").read_text()) == expected


def test_what_the_files_do_not_say_is_taken_from_the_options_and_then_said(
    make_checkpoint: MakeCheckpoint, write_fastertransformer: Write, tmp_path: Path
) -> None:
    split = write_fastertransformer(make_checkpoint(**FOUR_HEADS), tmp_path / "2-gpu", 2)
    default = run(split, tmp_path / "default", "huggingface")
    assert ModelConfig.read(default).context_length == 2048
    target = run(split, tmp_path / "target", "huggingface", context_length=96)
    assert ModelConfig.read(target).context_length == 96
    assert GPTJForCausalLM.from_pretrained(target).config.n_positions == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}", "{source}"], "SRC and DST are the same directory"),
        (["{source}", "{parent}/x/../{name}"], "SRC and DST are the same directory"),
        (["{source}", "{here}"], "exists already: DST is made, never changed"),
        (["{here}/nowhere", "{here}/new"], "nowhere does not exist"),
        (["{source}", "{here}/new", "--tensor-para-size", "3"], "a split into 3 does not divide the heads, 4"),
        (["{source}", "{here}/new", "--tensor-para-size", "0"], "a split into 0 does not divide the heads, 4"),
        (["{source}", "{here}/new", "--tensor-para-size", "-2"], "a split into -2 does not divide the heads, 4"),
        (["{source}", "{here}/new", "--context-length", "-1"], "--context-length is -1, allowed: 0 or more"),
        (["{source}", "{here}/new", "--context-length", "65"], "context_length is 65, but"),
        (
            ["{source}", "{here}/new", "--to", "huggingface", "--tensor-para-size", "2"],
            "--tensor-para-size is 2, but Hugging Face's files are not split",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line_and_writes_nothing(
    arguments: list[str],
    message: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_checkpoint(**FOUR_HEADS)
    (source.parent / "x").mkdir(exist_ok=True)
    places = {"source": source, "parent": source.parent, "name": source.name, "here": tmp_path}
    before = set(source.iterdir())
    capsys.readouterr()  # what saving the checkpoint said
    assert main(["--to", "fastertransformer", *(part.format(**places) for part in arguments)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("convert_checkpoint.py: ") and message in said and said.count("\n") == 1
    assert set(source.iterdir()) == before and list(tmp_path.iterdir()) == []


def test_a_split_that_the_inner_size_does_not_allow_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(**{**FOUR_HEADS, "n_inner": 90})
    with pytest.raises(ConfigError, match="a split into 4 does not divide the inner size, 90"):
        run(source, tmp_path / "target", "fastertransformer", 4)


def test_a_value_that_the_type_cannot_hold_is_refused_by_its_tensor(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = shutil.copytree(make_checkpoint(**FOUR_HEADS), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.1.mlp.fc_in.weight"][3, 5] = 1e5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.dense_h_to_4h\.weight has values that fp16 cannot hold"):
        run(source, tmp_path / "target", "fastertransformer", 1, "fp16")
    assert not (tmp_path / "target").exists()


@pytest.fixture(scope="module")
def large(make_checkpoint: MakeCheckpoint) -> Path:
    """About 190 MiB of weights in one file, its largest tensor 16 MiB."""
    return make_checkpoint(n_embd=512, n_layer=13, n_head=8, rotary_dim=64, vocab_size=8000)


@pytest.mark.parametrize("to", ["fastertransformer", "huggingface"])
def test_a_killed_conversion_leaves_no_result_and_goes_on_behind_the_last_whole_file(
    to: str, large: Path, tmp_path: Path
) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.partial"
    settings = {"source": large, "target": target, "to": to, "shard_bytes": 20_000_000}
    code = (
        "from pathlib import Path\n"
        "from gptj_triton.checkpoint.convert.conversion import Settings, convert\n"
        f"convert(Settings(Path({str(large)!r}), Path({str(target)!r}), {to!r}, shard_bytes=20_000_000))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and len([*partial.glob("*.bin"), *partial.glob("*.safetensors")]) < 3:
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.is_dir() and not target.exists()
    whole = {
        path.name: path.stat().st_mtime_ns for path in partial.iterdir() if path.suffix in (".bin", ".safetensors")
    }
    assert len(whole) >= 3

    with pytest.raises(ConfigError, match=r"target\.partial holds another conversion, or SRC has changed"):
        convert(Settings(**{**settings, "weight_data_type": "fp16"}))  # type: ignore[arg-type]
    convert(Settings(**settings))  # type: ignore[arg-type]
    assert not partial.exists()
    assert {name: (target / name).stat().st_mtime_ns for name in whole} == whole
    assert not {path.name for path in target.iterdir() if path.suffix == ".unfinished"}
    assert not (target / "conversion.json").exists()
    for got, expected in zip(engine_tensors(target), engine_tensors(large), strict=True):
        assert torch.equal(got, expected)


def test_a_kill_before_the_first_file_is_no_hindrance_and_a_foreign_directory_is_left_alone(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, partial = make_checkpoint(**FOUR_HEADS), tmp_path / "target.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds another conversion"):
        run(source, tmp_path / "target", "fastertransformer")
    assert (partial / "notes.txt").read_text() == "mine"
    (partial / "notes.txt").rename(partial / "conversion.json.unfinished")
    run(source, tmp_path / "target", "fastertransformer")


def test_a_source_that_has_changed_is_not_gone_on_with(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = shutil.copytree(make_checkpoint(**FOUR_HEADS), tmp_path / "source")
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.bias": torch.full((301,), torch.inf)}, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lm_head\.bias has values"):
        run(source, tmp_path / "target", "fastertransformer")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match="SRC has changed since: remove it"):
        run(source, tmp_path / "target", "fastertransformer")


def test_two_runs_at_once_do_not_write_the_same_files(large: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(large), str(tmp_path / "target"), "--to", "fastertransformer"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (tmp_path / "target.partial" / "conversion.json").exists():
            time.sleep(0.001)
        with pytest.raises(ConfigError, match=r"target\.partial is being written by another run"):
            run(large, tmp_path / "target", "fastertransformer")
    finally:
        assert process.wait() == 0
    assert (tmp_path / "target" / "config.ini").exists()


@pytest.mark.parametrize(("to", "data_type"), [("fastertransformer", "fp16"), ("huggingface", "fp32")])
def test_memory_holds_a_few_tensors_never_the_weights(to: str, data_type: str, large: Path, tmp_path: Path) -> None:
    """VmHWM, because ru_maxrss starts with the parent's."""
    code = (
        "from pathlib import Path\n"
        "from gptj_triton.checkpoint.convert.conversion import Settings, convert\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('VmHWM')).split()[1]) * 1024\n"
        "before = peak()\n"
        f"convert(Settings(Path({str(large)!r}), Path({str(tmp_path / 'target')!r}), {to!r}, 1, {data_type!r}))\n"
        "print(peak() - before)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (large / "model.safetensors").stat().st_size > 180 * MIB
    assert int(done.stdout) < 90 * MIB
