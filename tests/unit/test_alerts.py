"""deploy/prometheus: what promtool says of it, and whether its alerts speak of metrics and pages that there are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptj_triton.bench.debian_programs import debian_program
from gptj_triton.engine.metrics import METRICS, PREFIX
from gptj_triton.project import PROJECT

FOLDER = PROJECT / "deploy" / "prometheus"
GROUPS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
# Of others: Prometheus itself, Triton 2.51, the blackbox exporter, cAdvisor and the node exporter.
METRICS_OF_OTHERS = {
    "up",
    "nv_inference_count",
    "nv_inference_request_failure",
    "nv_cpu_memory_used_bytes",
    "nv_cpu_memory_total_bytes",
    "probe_success",
    "container_memory_working_set_bytes",
    "container_spec_memory_limit_bytes",
    "node_filesystem_avail_bytes",
    "node_filesystem_size_bytes",
}


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "arguments",
    [["check", "rules", "rules.yml"], ["check", "config", "prometheus.yml"], ["test", "rules", "rules.test.yml"]],
)
def test_promtool_finds_nothing_wrong(arguments: list[str]) -> None:
    program = debian_program("promtool")
    done = subprocess.run(
        [program.path, *arguments], cwd=FOLDER, env=program.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_is_so_what_to_do_and_where_more_stands(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert anchor in anchors(PROJECT / page), alert["annotations"]["runbook"]


def test_rules_ask_for_metrics_that_there_are() -> None:
    series = {f"{PREFIX}{name}" for name in METRICS}
    histograms = {f"{PREFIX}{name}_bucket" for name, metric in METRICS.items() if metric.kind == "histogram"}
    for rule in RULES:
        text = re.sub(r"\{.*?\}|\[.*?\]|by \(.*?\)|on \(.*?\)|group_left", "", rule["expr"])
        asked = set(re.findall(r"\b(?:up|[a-z]+[_:][a-z0-9_:]+)\b(?! *\()", text)) - {"predict_linear"}
        assert asked and asked <= series | histograms | RECORDED | METRICS_OF_OTHERS, rule["expr"]


def test_there_is_a_moment_at_which_each_alert_fires() -> None:
    expected = re.findall(r'alertname="(\w+)"', (FOLDER / "rules.test.yml").read_text())
    assert set(expected) == set(ALERTS)


def test_the_operations_page_names_each_alert_once() -> None:
    page = (PROJECT / "docs" / "operations.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`(Gptj\w+)`", page)) == sorted(ALERTS)
