"""A checkpoint of the shape of GPT-J 6B with random weights, for benchmarks where the text does not matter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from gptj_triton.checkpoint.data_types import COMPUTE_TYPES
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import model_tensors

# Twice the context of the released model, which rotary positions allow, so that 2048 tokens can follow 2048.
GPTJ_6B = ModelConfig(
    vocab_size=50400,
    context_length=4096,
    hidden_size=4096,
    inner_size=16384,
    num_layers=28,
    num_heads=16,
    rotary_dim=64,
    layer_norm_eps=1e-5,
    start_id=50256,
    end_ids=(50256,),
)


def write_random_checkpoint(directory: Path, model: ModelConfig, data_type: str) -> None:
    """A Hugging Face checkpoint of normally distributed weights; the seed is fixed."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for spec in model_tensors(model).values():
        mean = float(spec.name.endswith("layernorm.weight"))
        whole = torch.empty(spec.shape, dtype=COMPUTE_TYPES[data_type].dtype, device="cuda").normal_(mean, 0.02)
        tensors |= {name: torch.cat(views).cpu() for name, views in model.family.views(spec.name, whole).items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model.to_huggingface()))
