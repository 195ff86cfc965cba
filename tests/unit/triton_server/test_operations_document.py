"""docs/operations.md explains each metric and each reason, and nothing that there is not."""

from __future__ import annotations

import re

from gptj_triton.engine.metrics import METRICS, PREFIX
from gptj_triton.project import PROJECT

DOCUMENT = (PROJECT / "docs" / "operations.md").read_text()


def first_cells(heading: str) -> list[str]:
    """The names in the first column of the table under a heading."""
    section = re.split(r"^#+ ", DOCUMENT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.M)[0]
    cells = re.findall(r"^\| (.*?) \|", section, re.M)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_each_metric_is_explained_once() -> None:
    assert sorted(first_cells("What moves, and what to do")) == sorted(PREFIX + name for name in METRICS)


def test_each_reason_of_a_refusal_is_explained() -> None:
    assert set(first_cells("Refusals")) - {"reason"} == set(METRICS["request_refused_total"].values)


def test_all_that_is_named_is_a_metric() -> None:
    named = {name.removesuffix("_bucket") for name in re.findall(rf"\b{PREFIX}([a-z0-9_]+)", DOCUMENT)}
    assert named - {"request_"} <= METRICS.keys(), named - METRICS.keys()
