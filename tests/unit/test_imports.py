"""Promises about the structure: imports run one way, and what must stay light loads nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGE = PROJECT / "gptj_triton"

# Each folder or module of the package may import from itself and from those above it, never from those below.
ORDER = (
    *("project", "install", "errors", "stand_ins", "pidfd", "fields", "limits", "api_key"),
    *("text", "checkpoint", "engine", "process", "triton", "serving", "client"),
    *("plots", "storyteller", "bench"),
)
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> str:
    """`engine.gpu.model` for gptj_triton/engine/gpu/model.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Names after `gptj_triton.` of the modules that a file imports."""
    names: set[str] = set()
    known = {module(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name.removeprefix("gptj_triton.") in known else node.module for name in inside}
    return {name.removeprefix("gptj_triton.") for name in names if name.startswith("gptj_triton.")}


def test_everything_has_its_place_in_the_order() -> None:
    assert {module(path).split(".")[0] for path in FILES} - {""} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_run_one_way_from_folder_to_folder(path: Path) -> None:
    folders = {name.split(".")[0] for name in imported_modules(path)}
    own = module(path).split(".")[0]
    allowed = ORDER[: ORDER.index(own) + 1] if own else ORDER
    assert folders <= set(allowed)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module(path): imported_modules(path) for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_no_file_changes_the_search_path() -> None:
    for folder in ("gptj_triton", "tools", "backends", "model_repository", "tests"):
        for path in (PROJECT / folder).rglob("*.py"):
            assert path == Path(__file__) or "sys.path" not in path.read_text(), path


def test_only_what_is_for_gpus_needs_triton_the_language() -> None:
    for path in FILES:
        assert "gpu" in path.parts or "import triton\n" not in path.read_text(), path


def test_only_its_folder_knows_triton_the_server() -> None:
    for path in FILES:
        assert "triton" in path.relative_to(PACKAGE).parts or "pb_utils" not in path.read_text(), path


def test_a_frontend_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, gptj_triton.triton.replies, gptj_triton.process.client;"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
