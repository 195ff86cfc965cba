"""The version stands in pyproject.toml; all else that says it agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gptj_triton.project import PROJECT

VERSION = re.search(r'^version = "(.+)"$', (PROJECT / "pyproject.toml").read_text(), re.M)
IMAGE = re.compile(r"\b(?:gptj-triton:|newTag: )v?(\d+\.\d+\.\d+)")
SAYS_IMAGES = [
    path
    for folder in ("deploy", "docs")
    for path in sorted((PROJECT / folder).rglob("*"))
    if path.is_file() and path.suffix != ".png"
]


def test_the_newest_changes_are_those_of_this_version_and_have_a_date() -> None:
    assert VERSION is not None
    headings = re.findall(r"^## (.+)$", (PROJECT / "CHANGELOG.md").read_text(), re.M)
    assert re.fullmatch(rf"{re.escape(VERSION[1])} \(\d{{4}}-\d\d-\d\d\)", headings[0])


@pytest.mark.parametrize("path", [PROJECT / "README.md", *SAYS_IMAGES], ids=lambda path: path.name)
def test_images_have_this_version(path: Path) -> None:
    assert VERSION is not None
    assert set(IMAGE.findall(path.read_text())) <= {VERSION[1]}
