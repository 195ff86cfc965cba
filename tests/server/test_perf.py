"""The benchmarks run against a real server, and say in one line why when they cannot. Their figures are not judged."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptj_triton.bench.concurrency import measure_own_cost
from gptj_triton.bench.perf import measure, parse_arguments
from gptj_triton.bench.perf_analyzer import LENT_LIBRARIES, PerfError, find_perf_analyzer, lent_libraries

TOOLS = Path(__file__).parents[2] / "tools"


# Proxies that nothing may ask on the way to this machine.
NOWHERE = dict.fromkeys(["http_proxy", "https_proxy", "all_proxy", "grpc_proxy"], "http://127.0.0.1:1")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=160, env={**os.environ, **NOWHERE})


def test_perf_analyzer_measures_answers_over_both_protocols_and_streams(server: Any, tmp_path: Path) -> None:
    endpoints = ["--url", server.http_url, "--grpc-url", server.grpc_url, "--output", str(tmp_path / "new")]
    done = run("perf.py", *endpoints, "--concurrency", "2", "--requests-per-client", "1")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout.splitlines()[-1])["measurements"]
    assert [(each["protocol"], each["concurrency"]) for each in results] == [("http", 2), ("grpc", 2), ("stream", 2)]
    for result in results:
        assert 0 < result["requests_per_second"] <= result["responses_per_second"]
        assert 0 < result["p50_ms"] <= result["p90_ms"] <= result["p99_ms"]
    assert results[2]["responses_per_second"] > 1.5 * results[2]["requests_per_second"]  # two at least
    with (tmp_path / "new" / "perf.csv").open() as table:
        assert list(csv.DictReader(table)) == [{name: str(value) for name, value in each.items()} for each in results]
    assert (tmp_path / "new" / "perf.png").read_bytes().startswith(b"\x89PNG")


def test_perf_says_in_one_line_that_no_server_is_there() -> None:
    done = run("perf.py", "--url", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("perf.py: cannot reach 127.0.0.1:1")
    assert done.stderr.count("\n") == 1


def test_perf_serves_the_model_it_is_told(tmp_path: Path) -> None:
    done = run("perf.py", "--model", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"perf.py: serve.py ended; its last words: serve.py: --model {tmp_path}/nowhere")


@pytest.mark.parametrize("unused", [["--model", "gpt-j"], ["--", "--device", "cpu"]])
def test_perf_refuses_options_for_a_server_it_does_not_start(
    unused: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--url", "127.0.0.1:8000", *unused])
    assert "--url names a running server" in capsys.readouterr().err


def test_a_failing_perf_analyzer_is_a_failure_in_its_words() -> None:
    with find_perf_analyzer() as analyzer, pytest.raises(PerfError, match="failed to get model metadata"):
        measure(analyzer, "http", "127.0.0.1:1", concurrency=1, requests=1, timeout=30)


def test_a_perf_analyzer_that_hangs_is_a_failure(server: Any) -> None:
    url = server.http_url.removeprefix("http://")
    with find_perf_analyzer() as analyzer, pytest.raises(PerfError, match="did not finish within"):
        measure(analyzer, "http", url, concurrency=1, requests=1, timeout=0.1)


def test_a_missing_perf_analyzer_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match=r"perf_analyzer not found: .*tritonclient"), find_perf_analyzer(str(tmp_path)):
        pass


def test_an_installation_lends_both_libraries() -> None:
    libraries = lent_libraries()
    assert set(libraries) == set(LENT_LIBRARIES)
    assert all(path.is_file() for path in libraries.values())


def test_the_concurrency_benchmark_ends_in_one_json_line(server: Any) -> None:
    small = ["--requests", "3", "--max-tokens", "4", "--repeats", "1"]
    done = run("benchmark_concurrency.py", "--url", server.http_url, *small)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["benchmark"], result["requests"]) == ("concurrency", 3)
    [measurement] = result["measurements"]
    assert measurement["ratio"] == pytest.approx(measurement["concurrent_s"] / measurement["sequential_s"])
    assert min(measurement["one_token_ms"], measurement["two_tokens_ms"]) > 0


def test_the_cost_of_a_request_is_measured_with_an_engine_that_computes_nothing() -> None:
    assert 0 < measure_own_cost(["Once upon a time"], requests=1) < 1000  # milliseconds


def test_the_streaming_benchmark_ends_in_one_json_line_and_readers_that_stop_cost_little_memory() -> None:
    done = run("benchmark_streaming.py", "--quick", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    [line] = done.stdout.splitlines()
    tokens, memory = json.loads(line)["measurements"]
    assert (tokens["part"], tokens["streams"], tokens["max_tokens"]) == ("tokens", 4, 32)
    assert 0 < tokens["pieces_per_second"] <= tokens["tokens_per_second"]
    for times in ("first_token_ms", "between_tokens_ms", "between_pieces_ms"):
        p50, p90, p99 = tokens[times]
        assert 0 <= p50 <= p90 <= p99
    # What 32 readers leave of 900 tokens each took 314 MiB when every token was a piece that waited inside Triton.
    assert (memory["part"], memory["readers"]) == ("memory", 32)
    assert memory["worst"] - memory["before"] < 80


def test_the_streaming_benchmark_says_in_one_line_that_its_server_does_not_start(tmp_path: Path) -> None:
    done = run("benchmark_streaming.py", "--parts", "latency", "--", "--model", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("benchmark_streaming.py: serve.py ended; its last words: serve.py: --model ")
