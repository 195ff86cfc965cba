"""docs/operations.md names what there is: metrics, reasons, cases of `make faults`."""

from __future__ import annotations

import re

import pytest

from gptj_triton.bench.holding.faults import FAULTS, KILLS
from gptj_triton.engine.metrics import FINISH_REASONS, METRICS, PREFIX
from gptj_triton.project import PROJECT

PAGE = (PROJECT / "docs" / "operations.md").read_text()
METRIC = re.compile(rf"`({PREFIX}[a-z0-9_]+)")


def section(heading: str) -> str:
    """Its text, up to the next heading of any level."""
    return PAGE.partition(f"# {heading}\n")[2].partition("\n#")[0]


def first_cells(text: str) -> list[str]:
    """Those of a section's first table, without its head."""
    table = text.partition("\n| ---")[2].partition("\n\n")[0].partition("\n")[2]
    return re.findall(r"^\| (.*?) \|", table, re.M)


def test_the_table_of_metrics_has_each_once() -> None:
    cells = first_cells(section("What moves, and what to do"))
    named = [name for cell in cells for name in METRIC.findall(cell)]
    assert sorted(named) == sorted(PREFIX + name for name in METRICS)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))])
def test_pages_name_metrics_that_there_are(page: str) -> None:
    gone = {"gptj_running_sequences", "gptj_waiting_sequences"} if page == "docs/deployment.md" else set()
    own_words = {"gptj_triton", "gptj_request_"}  # the package, and the beginning of several names
    named = set(METRIC.findall((PROJECT / page).read_text()))
    assert named - gone - own_words <= {PREFIX + name for name in METRICS}


def test_the_table_of_refusals_has_each_reason_once() -> None:
    reasons = METRICS["request_refused_total"].values
    assert [cell.strip("`") for cell in first_cells(section("Refusals"))] == list(reasons)


def test_the_finish_reasons_are_those_that_are_counted() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{PREFIX}request_success_total`"))
    assert set(re.findall(r"`(\w+)` \(", row)) == set(FINISH_REASONS)


def test_the_table_of_faults_has_each_case() -> None:
    named = [name for cell in first_cells(section("Faults")) for name in re.findall(r"`([a-z…-]+)`", cell)]
    names = {fault.name for fault in FAULTS} | {KILLS}
    for each in named:
        assert any(re.fullmatch(each.replace("…", ".+"), name) for name in names), each
    assert [name for name in names if not any(re.fullmatch(each.replace("…", ".+"), name) for each in named)] == []
