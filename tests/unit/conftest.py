"""What the unit tests share: a checkpoint with a toy tokenizer, and small random checkpoints of either kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptj_triton.project import EMBEDDED_MODEL

# Another program may take the processor at any moment, so no example has a time limit of its own.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

MakeCheckpoint = Callable[..., Path]
WriteFasterTransformer = Callable[..., Path]

CORPUS = ["Once upon a time there was a tailor who had three sons. The youngest said: it is time, father!\n"] * 3


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as preprocessing and postprocessing want it: byte-level BPE of 300 tokens, the last one special."""
    directory = tmp_path_factory.mktemp("toy_checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"n_positions": 64, "vocab_size": 304, "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def storyteller() -> Path:
    """The checkpoint that ships with the repository."""
    return EMBEDDED_MODEL


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Saves a tiny random GPT-J, or a CodeGen; keyword arguments are the configuration's, equal ones give the same
    directory."""
    # Here, as most tests of this directory need neither.
    import torch
    import transformers

    made: dict[str, Path] = {}

    def make(family: str = "GPTJ", **overrides: Any) -> Path:
        shape = {"vocab_size": 257, "n_positions": 1024, "n_embd": 96, "n_layer": 2, "n_head": 3, "rotary_dim": 16}
        shape |= {"bos_token_id": 256, "eos_token_id": 256, "initializer_range": 0.2} | overrides
        key = repr((family, sorted(shape.items())))
        if key not in made:
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape))
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or ".ln_" in name:  # they are zeros and ones after initialisation
                    parameter.data += torch.randn_like(parameter) * 0.2
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def write_fastertransformer() -> WriteFasterTransformer:
    """Writes a Hugging Face checkpoint of one file as NVIDIA's converter does: numpy alone, a table of its own."""
    import torch
    from safetensors.torch import load_file

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

    def write(checkpoint: Path, target: Path, ranks: int, data_type: str = "fp32") -> Path:
        tensors = load_file(checkpoint / "model.safetensors")
        config = json.loads((checkpoint / "config.json").read_text())
        target.mkdir(parents=True)

        def save(name: str, tensor: torch.Tensor, axis: int | None = None) -> None:
            raw = tensor.to(dtypes[data_type]).contiguous().view(torch.int32 if data_type == "fp32" else torch.int16)
            if axis is None:
                raw.numpy().tofile(target / f"model.{name}.bin")
            else:
                for rank, part in enumerate(np.split(raw.numpy(), ranks, axis=axis)):
                    part.tofile(target / f"model.{name}.{rank}.bin")

        save("wte", tensors["transformer.wte.weight"])
        for kind in ("weight", "bias"):
            save(f"final_layernorm.{kind}", tensors[f"transformer.ln_f.{kind}"])
            save(f"lm_head.{kind}", tensors[f"lm_head.{kind}"])
        for number in range(config["n_layer"]):
            old, new = f"transformer.h.{number}.", f"layers.{number}."
            save(f"{new}input_layernorm.weight", tensors[f"{old}ln_1.weight"])
            save(f"{new}input_layernorm.bias", tensors[f"{old}ln_1.bias"])
            stacked = torch.stack([tensors[f"{old}attn.{kind}_proj.weight"] for kind in "qkv"])
            save(f"{new}attention.query_key_value.weight", stacked.permute(2, 0, 1), axis=-1)
            save(f"{new}attention.dense.weight", tensors[f"{old}attn.out_proj.weight"].T, axis=0)
            save(f"{new}mlp.dense_h_to_4h.weight", tensors[f"{old}mlp.fc_in.weight"].T, axis=-1)
            save(f"{new}mlp.dense_h_to_4h.bias", tensors[f"{old}mlp.fc_in.bias"], axis=0)
            save(f"{new}mlp.dense_4h_to_h.weight", tensors[f"{old}mlp.fc_out.weight"].T, axis=0)
            save(f"{new}mlp.dense_4h_to_h.bias", tensors[f"{old}mlp.fc_out.bias"])
        lines = {
            "model_name": "gptj",
            "head_num": config["n_head"],
            "size_per_head": config["n_embd"] // config["n_head"],
            "inter_size": config["n_inner"] or 4 * config["n_embd"],
            "num_layer": config["n_layer"],
            "rotary_embedding": config["rotary_dim"],
            "vocab_size": config["vocab_size"],
            "start_id": config["bos_token_id"],
            "end_id": config["eos_token_id"],
            "weight_data_type": data_type,
        }
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
        (target / "config.ini").write_text(f"[gptj]\n{text}")
        return target

    return write
