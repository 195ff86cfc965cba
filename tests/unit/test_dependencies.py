"""Every package that is imported is declared in pyproject.toml: for serving, or in an extra for what serving lacks."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "gptj_triton"
FILES = sorted([*PACKAGE.rglob("*.py"), *(PROJECT / "tools").glob("*.py"), *(PROJECT / "backends").rglob("*.py")])
# The extras that parts of the package may need besides; the rest of it is there when a server runs.
EXTRAS = {
    "gptj_triton/bench": {"bench", "compare", "fuzz", "plots"},
    "gptj_triton/storyteller": {"train", "plots"},
    "gptj_triton/plots.py": {"plots"},
    "gptj_triton/engine/gpu": {"gpu"},
}
NOT_INSTALLED = {"triton_python_backend_utils"}  # Triton's stub brings it
DISTRIBUTIONS = importlib.metadata.packages_distributions()


def normal(name: str) -> str:
    """https://packaging.python.org/en/latest/specifications/name-normalization/"""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extra: str | None = None) -> set[str]:
    """Names of the distributions that the base, or one extra by itself, asks for."""
    text = (PROJECT / "pyproject.toml").read_text()
    key = "dependencies" if extra is None else extra
    [listed] = re.findall(rf"^{key} = \[(.*?)\]$", strip_comments(text), re.S | re.M)
    return {normal(name) for name in re.findall(r'"([\w.-]+)', listed)}


def strip_comments(text: str) -> str:
    return re.sub(r" +#.*$", "", text, flags=re.M)


def imported(path: Path) -> Iterator[str]:
    """Top-level names of all imports that are neither the standard library's nor this package's."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names | {"gptj_triton"} | NOT_INSTALLED:
                yield top


def allowed(path: Path) -> set[str]:
    """What may be imported in one file."""
    extras = [names for place, names in EXTRAS.items() if str(path.relative_to(PROJECT)).startswith(place)]
    return declared().union(*(declared(extra) for names in extras for extra in names))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_import_is_declared(path: Path) -> None:
    found = {name: {normal(each) for each in DISTRIBUTIONS.get(name, [name])} for name in imported(path)}
    assert {name: names for name, names in found.items() if not names & allowed(path)} == {}


def test_serving_asks_for_nothing_that_only_tests_and_benchmarks_need() -> None:
    used = set().union(
        *(
            {normal(each) for name in imported(path) for each in DISTRIBUTIONS.get(name, [name])}
            for path in FILES
            if not str(path.relative_to(PROJECT)).startswith(tuple(EXTRAS))
        )
    )
    assert declared() <= used
    assert declared("tritonserver") == {"nvidia-pytriton"}  # a program and libraries, of which nothing is imported
    assert not declared() & {"pytest", "matplotlib", "fastapi", "uvicorn", "aiohttp", "hypothesis"}


def test_every_declared_package_is_pinned_as_it_was_tested() -> None:
    pins = dict(re.findall(r'"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)"', (PROJECT / "pyproject.toml").read_text()))
    constraints = re.findall(r"^([\w.-]+)==([\w.]+)", (PROJECT / "constraints.txt").read_text(), re.M)
    tested = {normal(name): version for name, version in constraints}
    assert {name: version for name, version in pins.items() if tested.get(normal(name), version) != version} == {}
