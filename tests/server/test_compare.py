"""The comparison runs for real, small: both services, the load generator, what it writes. Figures are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPARE = Path(__file__).parents[2] / "tools" / "compare.py"
SYSTEMS = ["FastAPI + transformers", "the same, batched", "this", "this, streamed"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMPARE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=170)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What it printed, and the directory that it wrote."""
    folder = tmp_path_factory.mktemp("comparison") / "results"
    done = run("--quick", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert "4/4" in done.stderr  # the progress bar
    return done.stdout, folder


@pytest.fixture(scope="module")
def result(compared: tuple[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((compared[1] / "results.json").read_text())
    return found


def test_all_systems_are_measured_under_the_same_load(result: dict[str, Any]) -> None:
    assert [each["system"] for each in result["measurements"]] == SYSTEMS
    for each in result["measurements"]:
        assert (each["clients"], each["requests"]) == (2, 6)
        assert each["tokens_per_second"] == pytest.approx(8 * each["requests_per_second"])
        assert 0 < each["latency_ms"][0] <= each["latency_ms"][1] <= each["latency_ms"][2]
        assert each["memory_mib"] > 100 and each["cores"] > 0


def test_only_a_stream_has_its_first_token_before_its_last(result: dict[str, Any]) -> None:
    *whole, streamed = result["measurements"]
    assert all(each["first_token_ms"] == each["latency_ms"] for each in whole)
    assert streamed["first_token_ms"][0] < streamed["latency_ms"][0]


def test_all_systems_give_the_same_greedy_text(result: dict[str, Any]) -> None:
    assert (result["device"], result["data_type"]) == ("cpu", "fp32")
    assert {each["system"]: (each["equal"], each["of"]) for each in result["texts"]} == {
        "the same, batched": (6, 6),
        "this": (6, 6),
    }


def test_the_results_are_a_table_plots_and_one_json_line(compared: tuple[str, Path]) -> None:
    stdout, folder = compared
    table = (folder / "table.md").read_text()
    assert all(f"| 2 | {system} |" in table for system in SYSTEMS)
    assert stdout.startswith(table)
    times = json.loads(stdout.splitlines()[-1])["times"]
    assert {name: list(ratios) for name, ratios in times.items()} == {name: ["2"] for name in SYSTEMS[:2]}
    for name in ("throughput.png", "first_token.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_earlier_results_are_drawn_again_without_a_server(compared: tuple[str, Path], tmp_path: Path) -> None:
    earlier = compared[1] / "results.json"
    done = run("--draw", str(earlier), "--output", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "results.json").read_text() == earlier.read_text()
    assert (tmp_path / "throughput.png").is_file()


def test_a_comparison_that_cannot_be_made_says_why_in_one_line(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path))
    assert (done.returncode, done.stderr) == (1, f"compare.py: {tmp_path} has no config.json\n")
    done = run("--prompt-tokens", "1000")
    too_long = "--prompt-tokens + --output-tokens must be at most 1024, the model's context"
    assert (done.returncode, done.stderr) == (1, f"compare.py: {too_long}\n")


def test_results_of_different_settings_are_not_drawn_as_one(compared: tuple[str, Path], tmp_path: Path) -> None:
    earlier = compared[1] / "results.json"
    other = json.loads(earlier.read_text()) | {"output_tokens": 9}
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = run("--draw", str(earlier), str(tmp_path / "other.json"), "--output", str(tmp_path))
    words = "results of different settings: output_tokens is 8 in one, 9 in another"
    assert (done.returncode, done.stderr) == (1, f"compare.py: {words}\n")
