"""The short form of `make fleet` holds: real servers behind a real proxy, one killed, then all restarted in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_triton.project import PROJECT

SECONDS = 300.0  # it takes 40 s where nothing else runs


@pytest.mark.timeout(SECONDS)
def test_behind_a_proxy_no_request_is_lost_when_a_server_is_killed_or_restarted(tmp_path: Path) -> None:
    short = ["--servers=2", "--clients=4", "--minutes=0.05", "--kill-every=3", "--longest=16", "--proxy=haproxy"]
    command = [sys.executable, str(PROJECT / "tools" / "fleet.py"), *short, f"--json={tmp_path / 'fleet.json'}"]
    command += ["--", "--drain-delay=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "fleet.json").read_text())
    assert found["broken"] == []
    assert [event["part"] for event in found["events"]] == ["kills", "rolling restart", "rolling restart"]
    together = [row for row in found["measurements"] if row["request"] == "together"]
    assert all(row["last"]["answered"] > 10 for row in together)
