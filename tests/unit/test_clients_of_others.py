"""The parts of `make clients`, which runs clients of others: scripts, verdicts, table. It is not run here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from asked import Told
from run_clients import SCRIPTS, SERVERS, Verdict, judge, label, table

PROJECT = Path(__file__).resolve().parents[2]
EXPECTED: dict[str, str | list[str]] = {
    "whole": " a king",
    "streamed": " a king",
    "several prompts": [" a king", " a wolf"],
}


def test_every_client_that_is_promised_has_a_script() -> None:
    promised = {
        "tritonclient",
        "perf_analyzer",
        "genai_perf",
        "aiperf",
        "litellm",
        "llama_index",
        "langchain",
        "kserve",
    }
    assert set(SCRIPTS) == promised


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=lambda path: path.stem)
def test_a_script_parses_and_the_reference_says_what_came_of_its_client(script: Path) -> None:
    names = {
        node.func.id
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert names & {"tell", "measure"} and "end" in names
    assert f"| {label(script)} |" in (PROJECT / "docs" / "reference.md").read_text()


def test_a_program_of_another_package_is_named_with_that_package() -> None:
    assert label(SCRIPTS["perf_analyzer"]).startswith("perf_analyzer of tritonclient 2")
    assert label(SCRIPTS["tritonclient"]).startswith("tritonclient 2")


def test_the_command_names_the_clients() -> None:
    command = [sys.executable, str(PROJECT / "tests" / "clients" / "run_clients.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in SCRIPTS)
    refused = subprocess.run([*command, "curl"], capture_output=True, text=True)
    assert refused.returncode == 2 and "no client curl" in refused.stderr
    assert f"tests/clients/{Path(command[1]).name} $(ARGS)" in (PROJECT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("told", "good", "note"),
    [
        (Told("w", "whole", " a king"), True, ""),
        (Told("w", "whole", " a queen"), False, "got ' a queen' instead of ' a king'"),
        (Told("w", "whole", error="Broken: pipe\n"), False, "Broken: pipe"),
        (Told("w", "streamed", " a king", pieces=2), True, ""),
        (Told("w", "streamed", " a king", pieces=1), False, "came in 1 piece"),
        (Told("w", "several prompts", [" a king", " a wolf"]), True, ""),
        (Told("w", "all but the last piece", " a ki"), True, ""),
        (Told("w", "all but the last piece", " a"), False, "got ' a' instead of ' a king'"),
        (Told("w", "error", error="max_tokens is 0; it must be 1 or more"), True, ""),
        (Told("w", "error", " a king"), False, "no error that names the field: ' a king'"),
        (Told("w", "whole", error="A Decoupled model", refused="decoupled", why="no infer"), True, "no infer"),
        (Told("w", "whole", error="other words", refused="decoupled", why="no infer"), False, "other words"),
        (
            Told("w", "whole", " a king", refused="decoupled", why="no infer"),
            False,
            "works now, though it should not: no infer",
        ),
        (Told("the script", "start", error="status 1: no network"), False, "status 1: no network"),
    ],
)
def test_what_a_client_tells_is_judged(told: Told, good: bool, note: str) -> None:
    assert judge("c 1.0", told, EXPECTED) == Verdict(
        "c 1.0", "w" if told.way == "w" else "the script", told.check, good, note
    )


def test_the_table_has_a_row_for_each_way_and_a_column_for_each_server() -> None:
    whole, streamed = Verdict("c 1.0", "`infer`", "whole", True), Verdict("c 1.0", "stream", "streamed", True)
    known = Verdict("c 1.0", "`infer`", "whole", True, "a | b")
    broken = Verdict("c 1.0", "stream", "streamed", False, "came in 1 piece")
    several = Verdict("c 1.0", "`infer`", "several prompts", True)
    assert table({"one": [whole, several, streamed], "two": [known, known, broken]}) == [
        "| client | way | one | two |",
        "| --- | --- | --- | --- |",
        "| c 1.0 | `infer` | whole, several prompts | no: a \\| b |",
        "| c 1.0 | stream | streamed | FAILS: streamed: came in 1 piece |",
    ]


def test_both_servers_are_tried() -> None:
    assert [models for _, models in SERVERS.values()] == [("ensemble", "ensemble_stream"), ("ensemble", "ensemble")]
