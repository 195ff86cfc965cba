"""FasterTransformer's files load to what the Hugging Face checkpoint loads to, bit for bit, at any split and type; and
whatever does not fit is refused by file, expected and found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptj_triton.checkpoint.data_types import COMPUTE_TYPES, WEIGHT_TYPES
from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.checkpoint.model_config import GPTJ_CONTEXT_LENGTH, ModelConfig
from gptj_triton.checkpoint.weights import ModelWeights, load_weights
from gptj_triton.errors import ConfigError

Write = Callable[..., Path]

CPU = torch.device("cpu")
THREE_HEADS: dict[str, Any] = {}
EIGHT_HEADS = {"n_embd": 64, "n_head": 8, "rotary_dim": 4, "vocab_size": 301}
ODD_INNER = {"n_embd": 48, "n_head": 3, "n_inner": 99, "rotary_dim": 16, "n_layer": 1, "vocab_size": 505}
GIT_LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 77056\n"
QKV = "model.layers.1.attention.query_key_value.weight.1.bin"


def load(checkpoint: Path, dtype: torch.dtype = torch.float32, context_length: int = 0) -> ModelWeights[Tensor]:
    return load_weights(checkpoint, ModelConfig.read(checkpoint, context_length), dtype, CPU)


def assert_equal(got: ModelWeights[Tensor], expected: ModelWeights[Tensor]) -> None:
    """Every bit of every tensor, and the layout in memory, on which the order of additions may depend."""

    def tensors(weights: ModelWeights[Tensor]) -> list[Tensor]:
        layers = [tensor for layer in weights.layers for tensor in vars(layer).values()]
        return [*layers, *(value for value in vars(weights).values() if isinstance(value, Tensor))]

    for mine, others in zip(tensors(got), tensors(expected), strict=True):
        assert mine.is_contiguous() and others.is_contiguous()
        assert mine.dtype == others.dtype and torch.equal(mine, others)


@pytest.fixture
def two_ranks(make_checkpoint: Callable[..., Path], write_fastertransformer: Write, tmp_path: Path) -> Path:
    """A split for two that a test may damage, with config.json beside it."""
    checkpoint = make_checkpoint(**EIGHT_HEADS)
    target = write_fastertransformer(checkpoint, tmp_path / "two", 2)
    shutil.copy(checkpoint / "config.json", target)
    return target


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        *((THREE_HEADS, ranks) for ranks in (1, 3)),
        *((EIGHT_HEADS, ranks) for ranks in (1, 2, 4, 8)),
        *((ODD_INNER, ranks) for ranks in (1, 3)),
    ],
)
def test_every_split_loads_to_what_hugging_face_files_load_to(
    shape: dict[str, Any],
    ranks: int,
    make_checkpoint: Callable[..., Path],
    write_fastertransformer: Write,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(**shape)
    target = write_fastertransformer(checkpoint, tmp_path / "weights", ranks)
    assert_equal(load(target, context_length=1024), load(checkpoint))
    assert ModelConfig.read(target, 1024) == ModelConfig.read(checkpoint)


@pytest.mark.parametrize("stored", WEIGHT_TYPES)
@pytest.mark.parametrize("asked", COMPUTE_TYPES)
def test_every_type_on_disk_loads_as_every_type(
    stored: str, asked: str, make_checkpoint: Callable[..., Path], write_fastertransformer: Write, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**EIGHT_HEADS)
    target = write_fastertransformer(checkpoint, tmp_path / "weights", 2, stored)
    stored_dtype, asked_dtype = WEIGHT_TYPES[stored].dtype, COMPUTE_TYPES[asked].dtype
    got, exact = load(target, asked_dtype, 1024), load(checkpoint)
    assert torch.equal(got.embedding, exact.embedding.to(stored_dtype).to(asked_dtype))
    if asked == "fp32":
        assert torch.equal(got.layers[1].out_weight, exact.layers[1].out_weight.to(stored_dtype).float())


def test_the_parent_of_a_split_stands_for_its_smallest(
    make_checkpoint: Callable[..., Path], write_fastertransformer: Write, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**EIGHT_HEADS)
    for ranks in (8, 2, 4):
        write_fastertransformer(checkpoint, tmp_path / f"{ranks}-gpu", ranks)
    (tmp_path / "1-gpu.partial").mkdir()
    (tmp_path / "1-gpu.partial" / "config.ini").touch()
    assert find_checkpoint_files(tmp_path).directory == tmp_path / "2-gpu"
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert_equal(load(tmp_path), load(checkpoint))
    assert_equal(load(tmp_path / "8-gpu"), load(checkpoint))


def test_weights_in_hugging_faces_layout_come_before_a_split_in_a_subdirectory(
    make_checkpoint: Callable[..., Path], write_fastertransformer: Write, tmp_path: Path
) -> None:
    both = shutil.copytree(make_checkpoint(**EIGHT_HEADS), tmp_path / "both")
    write_fastertransformer(both, both / "2-gpu", 2)
    assert find_checkpoint_files(both).directory == both
    assert find_checkpoint_files(both / "2-gpu").is_fastertransformer


def test_only_a_directory_named_for_its_split_looks_into_its_parent(two_ranks: Path) -> None:
    (two_ranks / "config.json").rename(two_ranks.parent / "config.json")
    assert ModelConfig.read(two_ranks).context_length == GPTJ_CONTEXT_LENGTH


def test_the_tokenizer_is_found_beside_the_weights_and_above_them(storyteller: Path, two_ranks: Path) -> None:
    split = two_ranks.rename(two_ranks.parent / "2-gpu")
    assert find_checkpoint_files(split).find("tokenizer.json") is None
    above = Path(shutil.copy(storyteller / "tokenizer.json", split.parent))
    assert find_checkpoint_files(split).find("tokenizer.json") == above
    assert find_checkpoint_files(split.parent).find("tokenizer.json") == above
    beside = Path(shutil.copy(storyteller / "tokenizer.json", split))
    assert find_checkpoint_files(split).find("tokenizer.json") == beside


def test_the_layer_norms_epsilon_is_that_of_config_json_else_gptjs(two_ranks: Path) -> None:
    config = two_ranks / "config.json"
    config.write_text(config.read_text().replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 0.25'))
    assert ModelConfig.read(two_ranks).layer_norm_eps == 0.25
    config.unlink()
    assert ModelConfig.read(two_ranks, 64).layer_norm_eps == 1e-5


def test_a_context_length_that_nothing_names_is_gptjs_and_one_that_contradicts_a_file_is_refused(
    two_ranks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"context_length is 64, but .*config\.json says 1024"):
        ModelConfig.read(two_ranks, 64)
    assert ModelConfig.read(two_ranks, 1024).context_length == 1024
    (two_ranks / "config.json").unlink()
    assert ModelConfig.read(two_ranks, 64).context_length == 64
    assert ModelConfig.read(two_ranks, 64, max_seq_len=528).context_length == 64
    assert ModelConfig.read(two_ranks, max_seq_len=528).context_length == 528
    assert not caplog.messages
    assert ModelConfig.read(two_ranks).context_length == 2048
    [warning] = caplog.messages
    assert "config.ini does not say how many tokens the context holds" in warning and "2048 are taken" in warning


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("head_num = 8", "head_num = 4", r"config\.json says hidden_size is 64, but .*config\.ini says 32"),
        ("inter_size = 256", "inter_size = 128", r"says inner_size is 256, but .*config\.ini says 128"),
        ("num_layer = 2", "num_layer = 3", r"says num_layers is 2, but .*config\.ini says 3"),
        ("vocab_size = 301", "vocab_size = 300", r"says vocab_size is 301, but .*config\.ini says 300"),
        ("rotary_embedding = 4", "rotary_embedding = 2", r"says rotary_dim is 4, but .*config\.ini says 2"),
        (
            "rotary_embedding = 4",
            "rotary_embedding = 3",
            r"config\.ini: rotary_embedding is 3, expected an even number",
        ),
        ("end_id = 256", "end_id = 255", r"says end_ids is \(256,\), but .*config\.ini says \(255,\)"),
        ("head_num = 8\n", "", r"config\.ini has no key 'head_num'"),
        ("num_layer = 2", "num_layer = two", r"config\.ini: num_layer is 'two', expected a whole number of 1 or more"),
        ("num_layer = 2", "num_layer = 0", r"config\.ini: num_layer is '0', expected a whole number of 1 or more"),
        ("[gptj]", "[gptneox]", r"config\.ini has no section \[gptj\], found: gptneox"),
        ("[gptj]", "gptj", r"config\.ini is no ini file"),
        ("[gptj]", "[gptj]\nlayers = 2", r"config\.ini has the unknown key 'layers'"),
        ("[gptj]", "[gptj]\nnum_tasks = 2", r"config\.ini: num_tasks is 2, but prompt-tuning tasks"),
        ("type = fp32", "type = int8", r"config\.ini: weight_data_type is 'int8', allowed: fp32, fp16, bf16"),
    ],
)
def test_a_config_ini_that_is_broken_or_contradicts_config_json_is_refused(
    old: str, new: str, message: str, two_ranks: Path
) -> None:
    replace(two_ranks / "config.ini", old, new)
    with pytest.raises(ConfigError, match=message):
        load(two_ranks)


def test_what_nvidias_converter_writes_besides_is_understood(two_ranks: Path) -> None:
    expected = load(two_ranks)
    replace(two_ranks / "config.ini", "model_name = gptj", "model_name = EleutherAI/100%\nnum_tasks = 0")
    replace(two_ranks / "config.ini", "weight_data_type = fp32\n", "")
    assert_equal(load(two_ranks), expected)
    replace(two_ranks / "config.ini", "rotary_embedding = 4", "rotary_embedding = None")
    (two_ranks / "config.json").unlink()
    assert ModelConfig.read(two_ranks, 64).rotary_dim == 8


@pytest.mark.parametrize(
    ("written", "expected"),
    [("[256, 7]", (256, 7)), ("None", ()), ("-1", ()), ("0", (0,)), ("301", ())],
)
def test_the_end_ids_of_config_ini_are_as_a_converter_wrote_them(
    written: str, expected: tuple[int, ...], two_ranks: Path
) -> None:
    replace(two_ranks / "config.ini", "end_id = 256", f"end_id = {written}")
    (two_ranks / "config.json").unlink()
    assert ModelConfig.read(two_ranks, 64).end_ids == expected


def test_config_ini_may_have_one_of_several_end_ids(two_ranks: Path) -> None:
    raw = json.loads((two_ranks / "config.json").read_text())
    (two_ranks / "config.json").write_text(json.dumps(raw | {"eos_token_id": [256, 7]}))
    assert ModelConfig.read(two_ranks).end_ids == (256, 7)
    (two_ranks / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert ModelConfig.read(two_ranks).end_ids == (8, 9)
    replace(two_ranks / "config.ini", "end_id = 256", "end_id = later")
    with pytest.raises(ConfigError, match=r"config\.ini: end_id is 'later', expected a whole number, a list of them"):
        ModelConfig.read(two_ranks)


def test_a_missing_file_is_refused_by_its_name_and_size(two_ranks: Path) -> None:
    (two_ranks / QKV).unlink()
    message = f"two/{QKV} is missing, expected 24576 bytes: [64, 3, 32] of fp32 by config.ini"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(two_ranks)


@pytest.mark.parametrize("change", [-24576, -4, -1, 1, 4, 24576])
def test_a_short_or_long_file_is_refused_with_what_was_expected_and_found(change: int, two_ranks: Path) -> None:
    content = (two_ranks / QKV).read_bytes()
    (two_ranks / QKV).write_bytes((content * 2)[: len(content) + change])
    message = f"{QKV} has {24576 + change} bytes, expected 24576 bytes: [64, 3, 32] of fp32"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(two_ranks)


def test_files_of_another_type_than_config_ini_says_are_refused(two_ranks: Path) -> None:
    replace(two_ranks / "config.ini", "fp32", "fp16")
    with pytest.raises(ConfigError, match=r"model\.wte\.bin has 77056 bytes, expected 38528 bytes: .* of fp16"):
        load(two_ranks)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.input_layernorm.bias.bin",
        "model.layers.1.attention.dense.bias.bin",
        "model.wpe.bin",
        "model.layers.1.attention.dense.weight.bin",
    ],
)
def test_a_file_that_belongs_to_no_tensor_is_refused_by_its_name(name: str, two_ranks: Path) -> None:
    (two_ranks / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} belongs to no tensor"):
        load(two_ranks)


def test_a_rank_that_is_missing_everywhere_or_one_too_many_is_refused(two_ranks: Path) -> None:
    shutil.copy(two_ranks / QKV, two_ranks / QKV.replace(".1.bin", ".2.bin"))
    with pytest.raises(ConfigError, match="the files count 3 ranks, but a split into 3 does not divide the heads, 8"):
        load(two_ranks)
    for path in two_ranks.glob("model.layers.*.[12].bin"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"0\.bin has 24576 bytes, expected 49152 bytes"):
        load(two_ranks)


def test_every_end_id_of_a_list_that_nvidias_converter_copied_ends_a_text(two_ranks: Path) -> None:
    (two_ranks / "config.json").unlink()
    replace(two_ranks / "config.ini", "end_id = 256", "end_id = [256, 10]")
    assert ModelConfig.read(two_ranks).end_ids == (256, 10)


def test_end_ids_of_generation_config_count_beside_a_config_ini_alone(two_ranks: Path) -> None:
    (two_ranks / "config.json").unlink()
    (two_ranks / "generation_config.json").write_text('{"eos_token_id": [9, 10]}')
    assert ModelConfig.read(two_ranks).end_ids == (9, 10)


def test_end_ids_of_config_ini_may_be_written_with_commas(two_ranks: Path) -> None:
    (two_ranks / "config.json").unlink()
    replace(two_ranks / "config.ini", "end_id = 256", "end_id = 256, 10")
    assert ModelConfig.read(two_ranks).end_ids == (256, 10)


def test_a_config_ini_may_name_no_start_token(two_ranks: Path) -> None:
    """NVIDIA's converter writes so where Hugging Face's bos_token_id is null."""
    (two_ranks / "config.json").unlink()
    replace(two_ranks / "config.ini", "start_id = 256", "start_id = None")
    assert ModelConfig.read(two_ranks).start_id == 0


@pytest.fixture
def fauxpilots(two_ranks: Path) -> Path:
    """The same files with the config.ini that FauxPilot's converter writes: the section [gpt] has its options and all
    that GPTJConfig has, as text (converter/huggingface_gptj_convert.py).
    """
    config = json.loads((two_ranks / "config.json").read_text())
    del config["model_type"]  # an attribute of the class, which the converter does not see
    keys = {"saved_dir": "/models", "in_file": "gptj", "trained_gpu_num": 1, "infer_gpu_num": 2, "processes": 4}
    keys |= {
        "weight_data_type": "fp32",
        "torch_dtype": "torch.float32",
        "id2label": {0: "LABEL_0"},
        "bad_words_ids": None,
    }
    text = "".join(f"{key} = {value}\n" for key, value in (keys | config).items())
    (two_ranks / "config.ini").write_text(f"[gpt]\n{text}\n")
    return two_ranks


def test_fauxpilots_config_ini_says_all_that_hugging_faces_config_json_says(
    fauxpilots: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(fauxpilots)
    config = ModelConfig.read(fauxpilots)
    (fauxpilots / "config.json").unlink()
    assert ModelConfig.read(fauxpilots) == config
    assert_equal(load(fauxpilots), expected)
    assert not caplog.messages
    with pytest.raises(ConfigError, match=r"context_length is 64, but .*config\.ini says 1024"):
        ModelConfig.read(fauxpilots, 64)


def test_fauxpilots_config_ini_may_lack_the_context_length(fauxpilots: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fauxpilots / "config.json").unlink()
    replace(fauxpilots / "config.ini", "n_positions = 1024\n", "")
    assert ModelConfig.read(fauxpilots).context_length == 2048
    assert "2048 are taken" in caplog.text
    assert ModelConfig.read(fauxpilots, 64).context_length == 64


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_layer = 2", "n_layer = two", r"config\.ini: n_layer is 'two', expected a whole number of 1 or more"),
        ("n_layer = 2\n", "", r"config\.ini has no key 'n_layer'"),
        ("rotary_dim = 4\n", "", r"config\.ini has no key 'rotary_dim', so this is no GPT-J"),
        ("gelu_new", "relu", r"config\.ini: activation_function is 'relu', expected 'gelu_new'"),
        ("n_positions = 1024", "n_positions = 512", r"config\.json says context_length is 1024, but .*ini says 512"),
    ],
)
def test_a_config_ini_of_fauxpilots_that_is_broken_is_refused(
    old: str, new: str, message: str, fauxpilots: Path
) -> None:
    replace(fauxpilots / "config.ini", old, new)
    if "config\\.json" not in message:
        (fauxpilots / "config.json").unlink()
    with pytest.raises(ConfigError, match=message):
        load(fauxpilots)


def test_files_that_an_editor_saved_with_a_byte_order_mark_are_read(two_ranks: Path) -> None:
    expected = ModelConfig.read(two_ranks)
    for name in ("config.ini", "config.json"):
        text = (two_ranks / name).read_text()
        (two_ranks / name).write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig")
    assert ModelConfig.read(two_ranks) == expected


@pytest.mark.parametrize("name", ["config.ini", "config.json", "model.wte.bin", QKV])
def test_a_git_lfs_pointer_in_place_of_a_file_is_called_that(name: str, two_ranks: Path) -> None:
    (two_ranks / name).write_text(GIT_LFS_POINTER)
    with pytest.raises(ConfigError, match=re.escape(f"{two_ranks / name} is a Git LFS pointer")):
        load(two_ranks)


@pytest.mark.parametrize("name", ["config.ini", "config.json", "model.wte.bin"])
def test_a_link_to_nothing_in_place_of_a_file_is_called_that(name: str, two_ranks: Path) -> None:
    (two_ranks / name).unlink()
    (two_ranks / name).symlink_to("../blobs/0")
    with pytest.raises(ConfigError, match=re.escape(f"{two_ranks / name} is a link to ../blobs/0, which does not")):
        load(two_ranks)
