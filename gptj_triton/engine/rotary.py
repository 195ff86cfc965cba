"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), GPT-J's interleaved kind."""

from __future__ import annotations

import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig


def rotary_table(config: ModelConfig, device: torch.device) -> Tensor:
    """complex64 [context, rotary_dim / 2]: the rotation of each pair at each position (Su et al., 2021,
    arXiv:2104.09864).
    """
    pairs = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), 10000.0**-pairs)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def rotate(heads: Tensor, rotations: Tensor) -> None:
    """Turn the first `rotary_dim` entries of each head in place, neighbours (0, 1), (2, 3), … as pairs.

    `heads` [..., head_size], `rotations` complex64 that broadcasts to [..., rotary_dim / 2].
    """
    turned = heads[..., : 2 * rotations.shape[-1]]
    pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)).contiguous())
    turned.copy_(torch.view_as_real(pairs * rotations).flatten(-2))
