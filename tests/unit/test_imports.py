"""Promises about the structure: imports run one way, and what must stay light loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
BACKEND = PROJECT / "backends" / "fastertransformer"

# Each module may import those above it, never those below. The door stands last: it knows the engine, not the reverse.
ENGINE_ORDER = (
    "errors",
    "lifetime",
    "checkpoint_files",
    "config",
    "sampling_params",
    "sequence",
    "token_bytes",
    "kv_pages",
    "scheduler",
    "batch",
    "tensor_table",
    "attention",
    "transformer",
    "huggingface",
    "fastertransformer",
    "weights",
    "model_rank",
    "sharded_model",
    "sampler",
    "beam",
    "runner",
    "engine",
    "messages",
    "server",
    "client",
)


def imported_modules(path: Path) -> set[str]:
    """Names after `gptj_engine.` that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "gptj_engine":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gptj_engine."):
            names.add(node.module.split(".")[1])
    return names


def test_every_module_of_the_engine_has_its_place_in_the_order() -> None:
    files = {path.stem for path in (BACKEND / "gptj_engine").glob("*.py")} - {"__init__"}
    assert files == set(ENGINE_ORDER)


@pytest.mark.parametrize("module", ENGINE_ORDER)
def test_imports_of_the_engine_run_one_way(module: str) -> None:
    allowed = set(ENGINE_ORDER[: ENGINE_ORDER.index(module)])
    if module == "runner":
        allowed.add("gpu")
    assert imported_modules(BACKEND / "gptj_engine" / f"{module}.py") <= allowed


@pytest.mark.parametrize("path", sorted((BACKEND / "gptj_engine" / "gpu").glob("*.py")), ids=lambda path: path.stem)
def test_what_is_for_gpus_knows_no_processes(path: Path) -> None:
    assert imported_modules(path) <= {"gpu", *ENGINE_ORDER[: ENGINE_ORDER.index("engine")]}


def test_only_what_is_for_gpus_needs_triton_the_language() -> None:
    for path in (BACKEND / "gptj_engine").glob("*.py"):
        assert "import triton" not in path.read_text(), path.name


def test_the_engine_knows_nothing_of_triton_the_server() -> None:
    for path in (BACKEND / "gptj_engine").rglob("*.py"):
        assert "triton_python_backend_utils" not in path.read_text(), path.name


def test_a_door_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, triton_io, gptj_engine.client; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=BACKEND, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
