"""Promises of tools/benchmark_engine.py on a tiny checkpoint that always wants to end. Its figures are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from gptj_triton.project import PROJECT

SCRIPT = PROJECT / "tools" / "benchmark_engine.py"
END = 96


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-J without a tokenizer, whose most probable token is the end id wherever it is allowed."""
    torch.manual_seed(0)
    shape = {"vocab_size": END + 1, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
    model = GPTJForCausalLM(GPTJConfig(**shape, bos_token_id=END, eos_token_id=END, initializer_range=0.2))
    model.lm_head.bias.data[END] = 100.0
    directory = tmp_path_factory.mktemp("benchmark") / "tiny"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> dict[str, Any]:
    """What a quick run on the CPU prints in its last line."""
    done = run("--quick", "--model", str(checkpoint), "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def test_a_quick_run_says_what_was_measured_and_has_a_measurement_for_each_concurrency(result: dict[str, Any]) -> None:
    assert (result["benchmark"], result["model"]) == ("engine", "tiny")
    assert (result["device"], result["data_type"], result["repeats"]) == ("cpu", "fp32", 1)
    assert [row["concurrency"] for row in result["measurements"]] == [1, 4]
    for row in result["measurements"]:
        ours, theirs = row["engine_tokens_per_s"], row["transformers_tokens_per_s"]
        assert min(ours, theirs) > 0
        assert row["ratio"] == pytest.approx(ours / theirs)


def test_every_sequence_gets_all_its_tokens_though_the_model_wants_to_end(result: dict[str, Any]) -> None:
    assert [row["tokens"] for row in result["measurements"]] == [count * result["new_tokens"] for count in (1, 4)]


def test_both_sides_give_the_same_greedy_tokens(result: dict[str, Any]) -> None:
    assert [(row["equal_sequences"], row["sequences"]) for row in result["measurements"]] == [(1, 1), (4, 4)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt-tokens", "30"], "--prompt-tokens + --new-tokens is 34, the model's context is 32"),
        (["--concurrency", "64", "--kv-cache-gib", "0.0001"], "--concurrency is 64, the KV cache has room for "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments: list[str], reason: str, checkpoint: Path) -> None:
    done = run("--quick", "--model", str(checkpoint), "--device", "cpu", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"benchmark_engine.py: {reason}")
    assert done.stderr.count("\n") == 1
