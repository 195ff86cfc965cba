"""The parts of `capacity.py` that measure a real server start and end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptj_triton.bench.capacity import command


def test_a_server_is_calibrated_and_its_file_gives_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.json"
    assert command.main(["--calibrate", str(steps), "--quick"]) == 0
    written = json.loads(steps.read_text())
    assert written["settings"]["max_sequences"] == 128
    assert written["coefficients"]["decoding"] > 0
    load = ["--steps", str(steps), "--rate=1", "--prompt=fixed:8", "--output=fixed:4", "--quick"]
    assert command.main(load) == 0
    assert "1 requests/s: 1 replicas" in capsys.readouterr().out


def test_a_validation_compares_all_figures(tmp_path: Path) -> None:
    result = tmp_path / "validation.json"
    assert command.main(["--validate", "--quick", "--json", str(result)]) == 0
    rows = json.loads(result.read_text())["measurements"]
    assert len(rows) == 3 * 3 * 2
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in rows)
