"""Puts an engine together: settings and checkpoint → model and sampler for the device → KV cache → engine."""

from __future__ import annotations

import msgspec
import torch

from gptj_triton.checkpoint.data_types import FP8
from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.device import choose_device
from gptj_triton.engine.eager.sharded_model import ShardedModel
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.kv_cache import PAGE_SIZE
from gptj_triton.engine.kv_cache_size import count_pages
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.runner import Model, ModelRunner, Sampler
from gptj_triton.engine.sampler import HostSampler
from gptj_triton.errors import ConfigError
from gptj_triton.text.token_bytes import load_token_bytes

# Compute capabilities.
OLDEST_GPU = (8, 0)  # Ampere
OLDEST_FLOAT8_GPU = (8, 9)  # Ada


def load_engine(config: EngineConfig) -> Engine:
    """Load a checkpoint on the device that the settings name; ConfigError when that cannot be done."""
    device = choose_device(config.device, 0, config.tensor_para_size)
    config = config.for_device(is_gpu=device.type == "cuda")
    model_config = ModelConfig.read(config.checkpoint, config.context_length, config.max_seq_len)
    # The ranks read the same checkpoint, and need not warn of what it lacks again.
    config = msgspec.structs.replace(config, context_length=model_config.context_length)
    kernels = suits_kernels(device, config, model_config)
    check_eight_bits(device, config, kernels)
    if kernels:
        from gptj_triton.engine.gpu.load import load_gpu_model  # needs triton, which comes with torch for GPUs alone

        model, sampler = load_gpu_model(config, model_config, device)
        return assemble(config, model_config, model, sampler)
    return assemble(config, model_config, ShardedModel(config, model_config), HostSampler())


def assemble(config: EngineConfig, model_config: ModelConfig, model: Model, sampler: Sampler) -> Engine:
    """An engine on a model that is loaded: sizes its KV cache and allocates it. ConfigError where that is too small.

    The model is closed when this fails.
    """
    try:
        tokenizer = find_checkpoint_files(config.tokenizer).find("tokenizer.json")
        token_bytes = load_token_bytes(tokenizer, model_config.vocab_size)
        num_pages = count_pages(config, model, model_config.context_length)
        model.allocate(num_pages)
    except BaseException:
        model.close()
        raise
    runner = ModelRunner(model, sampler, PagePool(num_pages, PAGE_SIZE))
    return Engine(
        runner,
        model_config,
        token_bytes,
        config.step_tokens,
        config.max_sequences,
        config.max_waiting_requests,
        config.max_waiting_tokens,
    )


def suits_kernels(device: torch.device, config: EngineConfig, model_config: ModelConfig) -> bool:
    """Whether the kernels of engine/gpu run this model: on one GPU, new enough, with heads of a size they know."""
    if device.type != "cuda" or config.tensor_para_size > 1:
        return False
    head_size = model_config.head_size
    known_size = head_size >= 16 and head_size.bit_count() == 1
    return known_size and torch.cuda.get_device_capability(device) >= OLDEST_GPU


def check_eight_bits(device: torch.device, config: EngineConfig, kernels: bool) -> None:
    """ConfigError where numbers of 8 bits are asked for and cannot be computed with; `kernels`: those of engine/gpu."""
    if config.int8_mode and not kernels:
        raise ConfigError("parameter int8_mode is 1, allowed: 0 unless there is one GPU, of compute capability 8.0 on")
    knows_float8 = kernels and torch.cuda.get_device_capability(device) >= OLDEST_FLOAT8_GPU
    for name, others in (("data_type", "fp32, fp16 or bf16"), ("kv_cache_data_type", "auto")):
        if getattr(config, name) == FP8 and not knows_float8:
            raise ConfigError(
                f"parameter {name} is 'fp8', allowed: {others} unless there is one GPU, of compute capability 8.9 on"
            )
