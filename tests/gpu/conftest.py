"""Kernels run on the GPU if there is one, else in Triton's interpreter; without triton these tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported
pytest.importorskip("triton", reason="triton (the language) is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter makes scalars of arrays, and says so for infinities and NaN that a kernel then masks."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
