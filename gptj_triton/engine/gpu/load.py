"""Loads a model on one GPU with the sampler that chooses its tokens there."""

from __future__ import annotations

import torch

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.gpu.beam_state import BeamState
from gptj_triton.engine.gpu.model import GpuModel
from gptj_triton.engine.gpu.sampler import GpuSampler
from gptj_triton.engine.gpu.sampling_state import SamplingState


def load_gpu_model(
    config: EngineConfig, model_config: ModelConfig, device: torch.device
) -> tuple[GpuModel, GpuSampler]:
    """ConfigError when the weights cannot be loaded."""
    state = SamplingState(config.max_sequences, model_config.vocab_size, device)
    model = GpuModel(config, model_config, device)
    return model, GpuSampler(state, BeamState(model.cache_indirection), model.keep_sampled)
