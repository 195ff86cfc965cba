"""What the engine's tests share: the embedded model and an engine on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTJForCausalLM

from gptj_triton.engine.config import EngineConfig, cpu_settings
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.load import load_engine

# An engine's environment, as it is where there are several threads. MKL reads it at its first product.
os.environ |= cpu_settings() | {"MKL_CBWR": "AUTO,STRICT"}


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
def reference(storyteller: Path) -> Any:
    """The embedded model as `transformers` runs it, in float32."""
    return GPTJForCausalLM.from_pretrained(storyteller, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def engine(storyteller: Path) -> Engine:
    """An engine on the embedded model whose KV cache is never short of pages. Tests leave it idle."""
    return load_engine(EngineConfig(str(storyteller), device="cpu", kv_cache_gib=0.5))


@pytest.fixture(scope="session")
def solitary(storyteller: Path) -> Engine:
    """A second one, for one request at a time only: it shares no page that was computed among others."""
    return load_engine(EngineConfig(str(storyteller), device="cpu", kv_cache_gib=0.5))
