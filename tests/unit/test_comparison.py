"""The comparison's pure parts: prompts, answers as perf_analyzer reports them, rows, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gptj_triton.bench.comparison.results import count_equal, make_row, request_count
from tokenizers import Tokenizer

from gptj_triton.bench.comparison.command import parse_arguments
from gptj_triton.bench.comparison.cost import Cost, read_samples
from gptj_triton.bench.comparison.load import Exchange, read_report, read_text
from gptj_triton.bench.comparison.prompts import make_prompts
from gptj_triton.bench.comparison.report import merge, ratios, summary
from gptj_triton.bench.perf_analyzer import PerfError

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
    rows = [
        {"system": system, "clients": clients, "requests_per_second": speed / 8, "tokens_per_second": speed}
        | {"latency_ms": [100.0, 200.0, 1234.4], "first_token_ms": [10.0, 20.0, 30.0], "memory_mib": 345.6}
        | {"cores": 0.94, "gpu_load_percent": None, "gpu_memory_mib": None}
        for system, speed in (("before", 50.0), ("after", 500.0))
        for clients in (1, 16)
    ]
    texts = [{"clients": 16, "system": "after", "equal": 3, "of": 4}]
    named = {"model": "storyteller", "machine": "a machine", "prompt_tokens": 8, "output_tokens": 4}
    return {**named, "rows": rows, "texts": texts, "left_out": ["before at 64 clients: too slow"], **changes}


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


def test_a_row_counts_from_the_first_request_to_the_last_answer() -> None:
    row = make_row("after", 2, [exchange(1.0, 1.5, 2.0), exchange(1.0, 1.5, 3.0)], output_tokens=8, cost=COST)
    assert (row.requests, row.seconds, row.requests_per_second, row.tokens_per_second) == (2, 2.0, 1.0, 8.0)
    assert row.latency_ms == pytest.approx((1500.0, 1900.0, 1990.0))
    assert row.first_token_ms == (500.0, 500.0, 500.0)
    assert (row.cores, row.generator_cores) == (1.5, 0.25)


def test_texts_count_as_equal_where_both_answered() -> None:
    assert count_equal({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == (1, 2)


@pytest.mark.parametrize(
    ("clients", "rate", "count"),
    [
        (1, 100.0, 16),  # the fewest
        (16, 100.0, 64),  # four a client
        (16, 2.0, 40),  # as many as fit the time
        (64, 1.0, 64),  # one a client, however long it takes
    ],
)
def test_slow_systems_get_fewer_requests_but_one_a_client(clients: int, rate: float, count: int) -> None:
    assert request_count(clients, each=4, fewest=16, rate=rate, seconds=20.0) == count


def test_what_nvidia_smi_cut_or_does_not_know_is_left_out() -> None:
    assert read_samples("83, 20481\n[N/A], 20481\n91, 20483\n95, 204") == [(83.0, 20481.0), (91.0, 20483.0)]
    assert read_samples("") == []


def test_throughput_is_compared_at_equal_numbers_of_clients() -> None:
    rows = result()["rows"]
    assert ratios(rows, "before", "after") == {1: 10.0, 16: 10.0}
    assert ratios(rows[1:], "before", "after") == {16: 10.0}


def test_the_summary_shows_what_was_left_out_and_columns_of_a_gpu_only_where_one_was() -> None:
    text = summary(result())
    assert "| 16 | after | 62.50 | 500 | 100 / 200 / 1,234 | 10 / 20 / 30 | 346 | 0.94 |" in text
    assert "| 16 | after | 3 of 4 |" in text and "Left out: before at 64 clients: too slow" in text
    assert "GPU" not in text
    gpu = result()
    gpu["rows"][0] |= {"gpu_load_percent": 87.6, "gpu_memory_mib": 20481.0}
    assert "GPU load, %" in summary(gpu) and "| 88 | 20,481 |" in summary(gpu)


def test_runs_are_joined_row_by_row() -> None:
    one, other = result(), result(rows=[], texts=[], left_out=["more"])
    assert merge([one, other]) == one | {"left_out": [*one["left_out"], "more"]}
    assert one == result()


def test_a_number_that_makes_no_load_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--concurrency", "1", "0"], ["--output-tokens", "0"], ["--prompt-tokens", "3"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
        assert "must be" in capsys.readouterr().err
