"""Every Hugging Face layout loads to the same model, and a broken checkpoint is refused in words that name the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTJForCausalLM

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.weights import ModelWeights, load_weights
from gptj_triton.errors import ConfigError

CPU = torch.device("cpu")
GIT_LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"
MLP = "transformer.h.1.mlp.fc_in.weight"


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> ModelWeights[Tensor]:
    return load_weights(checkpoint, ModelConfig.from_huggingface(checkpoint), dtype, CPU)


def all_tensors(weights: ModelWeights[Tensor]) -> list[Tensor]:
    layers = [tensor for layer in weights.layers for tensor in vars(layer).values()]
    return [*layers, *(value for value in vars(weights).values() if isinstance(value, Tensor))]


@pytest.fixture(scope="module")
def one_file(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


@pytest.fixture
def copy(one_file: Path, tmp_path: Path) -> Path:
    """A checkpoint in one file that a test may damage."""
    return shutil.copytree(one_file, tmp_path / "copy")


@pytest.fixture(scope="module")
def shards(one_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    GPTJForCausalLM.from_pretrained(one_file).save_pretrained(directory, max_shard_size="200KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def save_pickled(content: Any, checkpoint: Path, zipped: bool = True) -> None:
    """In place of the safetensors; not zipped is what torch wrote before version 1.6."""
    (checkpoint / "model.safetensors").unlink()
    torch.save(content, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def test_shards_load_to_what_one_file_loads_to(one_file: Path, shards: Path) -> None:
    for got, expected in zip(all_tensors(load(shards)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


def test_pytorch_files_load_to_what_safetensors_load_to(one_file: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


def test_pytorch_shards_load_to_what_safetensors_load_to(one_file: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"pytorch_model-{1 + (names.index(name) > 9):05}-of-00002.bin" for name in names}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, copy / file)
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


def test_weights_are_converted_to_the_type_asked_for(one_file: Path) -> None:
    assert {tensor.dtype for tensor in all_tensors(load(one_file, torch.float16))} == {torch.float16}


def test_a_directory_without_weights_is_refused_by_its_name(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"copy holds neither model\.safetensors nor pytorch_model\.bin"):
        load(copy)


def test_a_missing_shard_is_refused_by_its_name(shards: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(shards, tmp_path / "broken")
    missing = sorted(broken.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ConfigError, match=missing.name):
        load(broken)


def test_a_missing_tensor_is_refused_by_file_and_name(copy: Path, shards: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors[MLP]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"model\.safetensors has no tensor {MLP}"):
        load(copy)
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=rf"pytorch_model\.bin has no tensor {MLP}"):
        load(copy)

    broken = shutil.copytree(shards, tmp_path / "broken")
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][MLP]
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"model\.safetensors\.index\.json names no file for the tensor {MLP}"):
        load(broken)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_safetensors_file_is_refused_by_its_name(size: int, copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        load(copy)


def test_a_pytorch_file_from_before_torch_1_6_loads_to_the_same(one_file: Path, copy: Path) -> None:
    save_pickled(load_file(copy / "model.safetensors"), copy, zipped=False)
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


class Code:
    """Unpickling it makes a file, as that of a hostile checkpoint could do anything."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_pytorch_file_is_refused_and_never_runs(zipped: bool, copy: Path) -> None:
    save_pickled({"transformer.wte.weight": Code(copy / "ran")}, copy, zipped)
    with pytest.raises(
        ConfigError, match=r"pytorch_model\.bin cannot be read: it holds more than tensors \(.*\), and code"
    ):
        load(copy)
    assert not (copy / "ran").exists()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "pretrained_model.", "gptj."]
)
def test_what_tools_put_in_front_of_the_names_is_passed_over(prefix: str, one_file: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    for kept in ("transformer.", ""):
        renamed = {prefix + kept + name.removeprefix("transformer."): tensors[name] for name in tensors}
        save_file(renamed, copy / "model.safetensors")
        for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
            assert torch.equal(got, expected)


def test_what_tools_put_between_the_parts_of_names_is_passed_over(one_file: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    renamed = {name.replace(".attn.", "._fsdp_wrapped_module.attn._orig_mod."): tensors[name] for name in tensors}
    save_file(renamed, copy / "model.safetensors")
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "module"])
def test_tensors_inside_what_a_trainer_saved_are_found(name: str, one_file: Path, copy: Path) -> None:
    save_pickled({"epoch": 3, name: load_file(copy / "model.safetensors")}, copy)
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
)
def test_a_git_lfs_pointer_in_place_of_a_file_is_called_that(name: str, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_text(GIT_LFS_POINTER)
    message = f"{copy / name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {copy}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(copy)


def test_a_git_lfs_pointer_in_place_of_a_shard_or_of_config_json_is_called_that(shards: Path, tmp_path: Path) -> None:
    for name in (min(shards.glob("model-*.safetensors")).name, "config.json"):
        broken = shutil.copytree(shards, tmp_path / name)
        (broken / name).write_text(GIT_LFS_POINTER)
        with pytest.raises(ConfigError, match=re.escape(f"{broken / name} is a Git LFS pointer")):
            load(broken)


def test_a_pointer_beside_the_weights_that_are_read_does_no_harm(copy: Path) -> None:
    for name in ("pytorch_model.bin", "tf_model.h5"):
        (copy / name).write_text(GIT_LFS_POINTER)
    load(copy)


def test_a_link_to_nothing_in_place_of_the_weights_is_called_that(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("../../blobs/0")
    with pytest.raises(ConfigError, match=r"model\.safetensors is a link to \.\./\.\./blobs/0, which does not exist"):
        load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_this_user_may_not_read_are_called_that(name: str, copy: Path) -> None:
    if name == "pytorch_model.bin":
        save_pickled(load_file(copy / "model.safetensors"), copy)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        closed = shutil.copytree(copy, Path(folder, "closed"))
        closed.chmod(0o755)
        load(closed)  # imports what another user may not read
        (closed / name).chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may read all
            with pytest.raises(ConfigError, match=rf"{name} cannot be read: Permission denied"):
                load(closed)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_pytorch_file_is_refused_by_its_name(size: int, zipped: bool, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    torch.save(tensors, copy / "whole.bin", _use_new_zipfile_serialization=zipped)
    (copy / "pytorch_model.bin").write_bytes((copy / "whole.bin").read_bytes()[:size])
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        load(copy)


def test_a_wrong_shape_is_refused_with_what_was_expected_and_found(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors[MLP] = tensors[MLP][:-1].clone()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(
        ConfigError, match=rf"copy/model\.safetensors: {MLP} has shape \[383, 96\], expected \[384, 96\]"
    ):
        load(copy)


def test_a_configuration_of_another_size_is_refused_with_both_sizes(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"vocab_size": 300}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"wte\.weight has shape \[257, 96\], expected \[300, 96\] by config\.json"):
        load(copy)


@pytest.mark.parametrize("zipped", [False, True])
def test_parameters_in_place_of_tensors_load_to_the_same(zipped: bool, one_file: Path, copy: Path) -> None:
    """As `dict(model.named_parameters())` has them."""
    tensors = load_file(copy / "model.safetensors")
    save_pickled({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, copy, zipped)
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_one_file_comes_before_an_index_beside_it(name: str, one_file: Path, copy: Path) -> None:
    if name == "pytorch_model.bin":
        save_pickled(load_file(copy / "model.safetensors"), copy)
    index = {"weight_map": {MLP: f"gone-{name}"}}
    (copy / f"{name}.index.json").write_text(json.dumps(index))
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


def test_an_index_that_names_no_file_for_a_tensor_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {MLP: None}}))
    with pytest.raises(ConfigError, match=rf"index\.json names None for the tensor {MLP}, expected a file"):
        load(copy)


def test_names_without_the_prefix_load_to_the_same(one_file: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensors[name] for name in tensors}, copy / "model.safetensors")
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


def test_a_tensor_that_the_configuration_does_not_have_is_refused_by_file_and_name(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    for name in ("transformer.h.2.ln_1.bias", "transformer.h.0.attn.q_proj.bias", "wte.weight", "score.weight"):
        save_file(tensors | {name: torch.zeros(96)}, copy / "model.safetensors")
        with pytest.raises(ConfigError, match=rf"model\.safetensors has the tensor {name}, which a GPT-J of this"):
            load(copy)


def test_a_tensor_that_the_index_leaves_out_is_refused_by_file_and_name(shards: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(shards, tmp_path / "broken")
    shard = max(broken.glob("model-*.safetensors"))
    save_file(load_file(shard) | {"score.weight": torch.zeros(96)}, shard)
    with pytest.raises(ConfigError, match=rf"index\.json names no file for the tensor score\.weight, .*{shard.name}"):
        load(broken)


def test_constants_that_older_releases_saved_are_passed_over(one_file: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    for name in ("bias", "masked_bias", "embed_positions", "rotary_emb.inv_freq"):
        tensors[f"transformer.h.1.attn.{name}"] = torch.zeros(3)
    save_file(tensors, copy / "model.safetensors")
    for got, expected in zip(all_tensors(load(copy)), all_tensors(load(one_file)), strict=True):
        assert torch.equal(got, expected)


def test_constants_that_older_releases_saved_with_a_codegen_are_passed_over(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    codegen = make_checkpoint("CodeGen", n_head=4)
    older = shutil.copytree(codegen, tmp_path / "older")
    tensors = load_file(older / "model.safetensors")
    save_file(tensors | {"transformer.h.1.attn.causal_mask": torch.ones(3)}, older / "model.safetensors")
    for got, expected in zip(all_tensors(load(older)), all_tensors(load(codegen)), strict=True):
        assert torch.equal(got, expected)
    save_file(tensors | {"transformer.h.1.attn.qkv_proj.bias": torch.ones(288)}, older / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"the tensor transformer\.h\.1\.attn\.qkv_proj\.bias, which a CodeGen of this"
    ):
        load(older)


def test_a_fused_matrix_of_a_wrong_shape_is_refused_with_what_was_expected_and_found(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(make_checkpoint("CodeGen", n_head=4), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = "transformer.h.0.attn.qkv_proj.weight"
    save_file(tensors | {name: tensors[name][:96].clone()}, broken / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"qkv_proj\.weight has shape \[96, 96\], expected \[288, 96\] by config\.json"
    ):
        load(broken)


def test_tied_embeddings_are_both_matrices_and_untied_ones_must_be_there(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors has no tensor lm_head\.weight"):
        load(copy)
    config = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(copy).head_weight, tensors["transformer.wte.weight"].T)


def test_what_holds_no_floating_point_tensors_is_refused_by_its_name(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {MLP: tensors[MLP].to(torch.int8)}, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"model\.safetensors: {MLP} is of torch\.int8, expected floating point"):
        load(copy)
    (copy / "model.safetensors").unlink()
    torch.save(["no", "tensors"], copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin holds something else than tensors by name"):
        load(copy)
