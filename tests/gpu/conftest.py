"""Kernels run on the GPU if there is one, else in Triton's interpreter; without triton these tests are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported


class ModuleWithoutTriton(pytest.Module):
    """A test file that is not imported, as it would import triton."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip("triton (the language) is not installed")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """What pytest does unless triton is missing."""
    if find_spec("triton"):
        return None
    return ModuleWithoutTriton.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter makes scalars of arrays, and says so for infinities and NaN that a kernel then masks."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
