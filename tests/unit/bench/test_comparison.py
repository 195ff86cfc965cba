"""The comparison without servers: prompts, answers as perf_analyzer reports them, what is measured, tables."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gptj_triton.bench.comparison.command import parse_arguments
from gptj_triton.bench.comparison.comparison import Comparison
from gptj_triton.bench.comparison.cost import Cost, read_samples
from gptj_triton.bench.comparison.load import Exchange, read_report, read_text
from gptj_triton.bench.comparison.measurement import (
    count_equal,
    fewest_requests,
    least_seconds,
    make_measurement,
    request_count,
)
from gptj_triton.bench.comparison.prompts import make_prompts
from gptj_triton.bench.comparison.report import SETTINGS, MergeError, merge, ratios, summary
from gptj_triton.bench.comparison.systems import BASELINE, BATCHED, STREAMED, THIS, Running, Server
from gptj_triton.bench.perf_analyzer import PerfError
from gptj_triton.project import PROJECT

COST = Cost(
    cpu_seconds=3.0,
    generator_cpu_seconds=0.5,
    other_cores=0.1,
    memory_mib=300.0,
    gpu_load_percent=None,
    gpu_memory_mib=None,
)


def exchange(sent: float, first: float, last: float) -> Exchange:
    return Exchange(f"prompt {sent}", "text", sent, first, last)


def result(**changes: Any) -> dict[str, Any]:
    measurements = [
        {"system": system, "clients": clients, "requests_per_second": speed / 8, "tokens_per_second": speed}
        | {"latency_ms": [100.0, 200.0, 1234.4], "first_token_ms": [10.0, 20.0, 30.0], "memory_mib": 345.6}
        | {"cores": 0.94, "gpu_load_percent": None, "gpu_memory_mib": None, "requests": 48}
        for system, speed in ((BASELINE, 50.0), (THIS, 500.0))
        for clients in (1, 16)
    ]
    texts = [{"clients": 16, "system": THIS, "equal": 3, "of": 4}]
    setting: dict[str, Any] = {
        "benchmark": "comparison",
        "model": "storyteller",
        "machine": "a machine",
        "device": "cpu",
    }
    setting |= {"data_type": "fp32", "prompt_tokens": 8, "output_tokens": 4}
    left_out = [f"{BASELINE} at 64 clients: too slow"]
    return {**setting, "measurements": measurements, "texts": texts, "left_out": left_out, **changes}


@pytest.mark.parametrize("tokens", [4, 32])
def test_prompts_are_as_long_as_asked_and_all_different(toy_checkpoint: Path, tokens: int) -> None:
    tokenizer = Tokenizer.from_file(str(toy_checkpoint / "tokenizer.json"))  # it cuts most words in pieces
    prompts = make_prompts(tokenizer, tokens, 64, "a seed")
    assert [len(tokenizer.encode(prompt).ids) for prompt in prompts] == [tokens] * 64
    assert len(set(prompts)) == 64
    assert make_prompts(tokenizer, tokens, 16, "a seed") == prompts[:16]
    assert not set(make_prompts(tokenizer, 32, 16, "another")) & set(prompts)


def test_an_answer_is_read_whole_or_as_events() -> None:
    assert read_text('{"text_output": "a b"}') == "a b"
    assert read_text('data: {"text_output": "a"}\n\ndata: {"text_output": " b"}\n\n') == "a b"


@pytest.mark.parametrize("answer", ["", '{"error": "no"}', 'data: {"text_output": "a"}\n\ndata: {"error": "no"}\n\n'])
def test_an_answer_without_a_text_is_a_failure(answer: str) -> None:
    with pytest.raises(PerfError, match="an answer without a text"):
        read_text(answer)


def test_a_report_has_the_times_of_each_request_in_seconds() -> None:
    request = {
        "timestamp": 2_000_000_000,
        "request_inputs": {"payload": '{"text_input": "Once"}'},
        "response_timestamps": [2_500_000_000, 4_000_000_000],
        "response_outputs": [
            {"response": 'data: {"text_output": " upon"}\n\n'},
            {"response": 'data: {"text_output": " a"}\n\n'},
        ],
    }
    report = json.dumps({"experiments": [{"requests": [request]}]})
    assert read_report(report) == [Exchange("Once", " upon a", sent=2.0, first=2.5, last=4.0)]


def test_a_measurement_counts_from_the_first_request_to_the_last_answer() -> None:
    exchanges = [exchange(1.0, 1.5, 2.0), exchange(1.0, 1.5, 3.0)]
    made = make_measurement(THIS, 2, exchanges, output_tokens=8, cost=COST)
    assert (made.requests, made.seconds, made.requests_per_second, made.tokens_per_second) == (2, 2.0, 1.0, 8.0)
    assert made.latency_ms == pytest.approx((1500.0, 1900.0, 1990.0))
    assert made.first_token_ms == (500.0, 500.0, 500.0)
    assert (made.cores, made.generator_cores) == (1.5, 0.25)


def test_texts_count_as_equal_where_both_answered() -> None:
    assert count_equal({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == (1, 2)


@pytest.mark.parametrize(
    ("clients", "at_once", "fewest"),
    [
        (16, 64, 48),  # batches of 16: nobody else asks
        (64, 64, 192),
        (200, 64, 200),  # three full batches, and one request a client
        (64, 1, 64),  # one at a time: three rounds are three requests
        (1, 1, 3),
    ],
)
def test_a_measurement_has_three_full_rounds_and_a_request_of_each_client(
    clients: int, at_once: int, fewest: int
) -> None:
    assert fewest_requests(clients, at_once) == fewest


def test_rounds_take_at_least_the_time_of_one_request_each() -> None:
    assert least_seconds(16, 64, alone=0.5) == 1.5
    assert least_seconds(64, 1, alone=0.5) == 32.0


@pytest.mark.parametrize(
    ("wanted", "fewest", "rate", "count"),
    [
        (64, 48, 100.0, 64),  # as many as wanted
        (64, 16, 2.0, 40),  # as many as fit the time
        (64, 48, 1.0, 48),  # the fewest, however long they take
    ],
)
def test_slow_systems_get_fewer_requests_but_enough(wanted: int, fewest: int, rate: float, count: int) -> None:
    assert request_count(wanted, fewest, rate, seconds=20.0) == count


class FakeSystems:
    """Servers that note when they are started and what they are asked; each request takes its system's seconds."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self.started: list[str] = []
        self.requests: list[tuple[str, int, int]] = []  # system, clients, requests

    def server(self, name: str, at_once: int) -> Server:
        @contextlib.contextmanager
        def start() -> Iterator[Running]:
            self.started.append(name)
            yield Running(os.getpid(), {name: name})

        return Server((name,), at_once, start)

    def drive(self, url: str, bodies: list[dict[str, Any]], clients: int, timeout: float) -> list[Exchange]:
        self.requests.append((url, clients, len(bodies)))
        took = self._seconds[url]
        return [Exchange(body["text_input"], "text", 0.0, took, took) for body in bodies]


def run_fakes(checkpoint: Path, fakes: FakeSystems, servers: list[Server], *concurrency: str) -> dict[str, Any]:
    """The last result."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    options = parse_arguments(["--device", "cpu", "--phase-seconds", "2", "--concurrency", *concurrency])
    return list(Comparison(fakes.drive, tokenizer, options).run(servers))[-1]


def test_a_system_that_is_too_slow_is_neither_warmed_up_nor_started_again(toy_checkpoint: Path) -> None:
    fakes = FakeSystems({BASELINE: 1.0, THIS: 0.1})
    servers = [fakes.server(BASELINE, 1), fakes.server(THIS, 64)]
    found = run_fakes(toy_checkpoint, fakes, servers, "16", "64")
    assert [(each["system"], each["clients"]) for each in found["measurements"]] == [(THIS, 16), (THIS, 64)]
    assert [each for each in fakes.requests if each[0] == BASELINE] == [(BASELINE, 1, 1), (BASELINE, 1, 1)]
    assert fakes.started == [BASELINE, THIS, THIS]
    assert found["left_out"] == [
        f"{BASELINE} at 16 clients: 16 requests would take 16 s",
        f"{BASELINE} at 64 clients: 64 requests would take 64 s",
    ]


def test_a_batched_system_gets_three_rounds_where_time_would_allow_one(toy_checkpoint: Path) -> None:
    fakes = FakeSystems({BATCHED: 1.5})
    found = run_fakes(toy_checkpoint, fakes, [fakes.server(BATCHED, 64)], "16")
    assert [each["requests"] for each in found["measurements"]] == [48]


def test_what_nvidia_smi_cut_or_does_not_know_is_left_out() -> None:
    assert read_samples("83, 20481\n[N/A], 20481\n91, 20483\n95, 204") == [(83.0, 20481.0), (91.0, 20483.0)]
    assert read_samples("") == []


def test_throughput_is_compared_at_equal_numbers_of_clients() -> None:
    measurements = result()["measurements"]
    assert ratios(measurements, BASELINE, THIS) == {1: 10.0, 16: 10.0}
    assert ratios(measurements[1:], BASELINE, THIS) == {16: 10.0}


def test_the_summary_shows_what_was_left_out_and_columns_of_a_gpu_only_where_one_was() -> None:
    text = summary(result(), BASELINE)
    assert "| 16 | this | 48 | 62.50 | 500 | 100 / 200 / 1,234 | 10 / 20 / 30 | 25.0 | 346 | 0.94 |" in text
    assert "| 16 | this | 3 of 4 |" in text and f"Left out: {BASELINE} at 64 clients: too slow" in text
    assert "GPU" not in text
    gpu = result()
    gpu["measurements"][0] |= {"gpu_load_percent": 87.6, "gpu_memory_mib": 20481.0}
    assert "GPU load, %" in summary(gpu, BASELINE) and "| 88 | 20,481 |" in summary(gpu, BASELINE)


def test_runs_are_joined_measurement_by_measurement() -> None:
    one, other = result(), result(measurements=[], texts=[], left_out=["more"])
    assert merge([one, other]) == one | {"left_out": [*one["left_out"], "more"]}
    assert one == result()


@pytest.mark.parametrize("name", SETTINGS)
def test_runs_of_different_settings_are_not_joined(name: str) -> None:
    with pytest.raises(MergeError, match=f"^results of different settings: {name} is .* in one, 'other' in another$"):
        merge([result(), result(), result(**{name: "other"})])


@pytest.mark.parametrize("name", ["comparison.json", "comparison-h100.json"])
def test_the_document_has_the_committed_figures_of_systems_called_by_name(name: str) -> None:
    committed = json.loads((PROJECT / "docs" / name).read_text())
    assert merge([committed]) == committed
    assert {each["system"] for each in committed["measurements"]} == {BASELINE, BATCHED, THIS, STREAMED}
    document = (PROJECT / "docs" / "comparison.md").read_text()
    table = summary(committed, BASELINE).partition("\n\n")[2].partition("\n\n")[0]
    assert table in document


def test_a_number_that_makes_no_load_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--concurrency", "1", "0"], ["--output-tokens", "0"], ["--prompt-tokens", "3"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
        assert "must be" in capsys.readouterr().err
