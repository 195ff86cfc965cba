"""What the engine's tests share: small random checkpoints, the embedded model and an engine on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gptj_engine.client import cpu_settings
from gptj_engine.config import EngineConfig
from gptj_engine.engine import Engine
from transformers import GPTJConfig, GPTJForCausalLM

# An engine's environment, as it is where there are several threads. MKL reads it at its first product.
os.environ |= cpu_settings() | {"MKL_CBWR": "AUTO,STRICT"}

ROOT = Path(__file__).resolve().parents[3]

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for more, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For promises that must hold however torch divides its work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def storyteller() -> Path:
    """The checkpoint that ships with the repository."""
    return ROOT / "model_repository" / "fastertransformer" / "1" / "storyteller"


@pytest.fixture(scope="session")
def reference(storyteller: Path) -> Any:
    """The embedded model as `transformers` runs it, in float32."""
    return GPTJForCausalLM.from_pretrained(storyteller, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def engine(storyteller: Path) -> Engine:
    """An engine on the embedded model whose KV cache is never short of pages. Tests leave it idle."""
    return Engine(EngineConfig(str(storyteller), device="cpu", kv_cache_gib=0.5))


@pytest.fixture(scope="session")
def solitary(storyteller: Path) -> Engine:
    """A second one, for one request at a time only: it shares no page that was computed among others."""
    return Engine(EngineConfig(str(storyteller), device="cpu", kv_cache_gib=0.5))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Saves a tiny random GPT-J; keyword arguments are GPTJConfig's, equal ones give the same directory."""
    made: dict[str, Path] = {}

    def make(**overrides: Any) -> Path:
        shape = {"vocab_size": 257, "n_positions": 1024, "n_embd": 96, "n_layer": 2, "n_head": 3, "rotary_dim": 16}
        shape |= {"bos_token_id": 256, "eos_token_id": 256, "initializer_range": 0.2} | overrides
        key = repr(sorted(shape.items()))
        if key not in made:
            torch.manual_seed(0)
            model = GPTJForCausalLM(GPTJConfig(**shape))
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or ".ln_" in name:  # they are zeros and ones after initialisation
                    parameter.data += torch.randn_like(parameter) * 0.2
            made[key] = tmp_path_factory.mktemp("gptj")
            model.save_pretrained(made[key])
        return made[key]

    return make
