"""What an engine counts: what a report holds, that everything is reported once, and what an engine's steps add."""

from __future__ import annotations

import time

import msgspec
import pytest

from gptj_triton.engine.engine import Engine
from gptj_triton.engine.metrics import (
    FINISH_REASONS,
    METRICS,
    EngineMetrics,
    RequestMetrics,
    Sample,
    UnansweredRequests,
)
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence

PROMPT = list(range(300, 340))


def test_every_metric_has_a_kind_and_says_what_it_is() -> None:
    assert set(METRICS) == {*EngineMetrics.__struct_fields__, *RequestMetrics.__struct_fields__}
    for name, metric in METRICS.items():
        assert metric.help
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert bool(metric.label) == bool(metric.values)
        assert name.endswith("_total") or metric.kind != "counter"
        assert metric.twin is None or metric.kind == "gauge"


def test_a_report_survives_the_way_to_a_frontend() -> None:
    metrics = EngineMetrics(num_requests_running=2, generation_tokens_total=7)
    metrics.step_sequences.observe(1, 2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(metrics), type=EngineMetrics) == metrics


def test_what_was_counted_is_reported_once_and_gauges_stay() -> None:
    metrics = EngineMetrics(num_requests_running=2, generation_tokens_total=7)
    metrics.step_sequences.observe(4)
    report = metrics.take()
    assert (report.num_requests_running, report.generation_tokens_total, report.step_sequences.values) == (2, 7, [4])
    assert (metrics.num_requests_running, metrics.generation_tokens_total, metrics.step_sequences.values) == (2, 0, [])


@pytest.mark.parametrize("name", ["num_requests_running", "generation_tokens_total", "step_sequences"])
def test_there_is_news_when_anything_has_happened(name: str) -> None:
    metrics = EngineMetrics(num_requests_waiting=1)
    report = metrics.take()
    assert not metrics.has_news(report)
    if name == "step_sequences":
        metrics.step_sequences.observe(0)
    else:
        setattr(metrics, name, 1)
    assert metrics.has_news(report)
    assert not metrics.has_news(metrics.take())


@pytest.mark.parametrize("group", [1, 7, 64, 1000])
def test_a_histogram_keeps_an_even_choice_of_many_values(group: int) -> None:
    sample = Sample(64)
    for first in range(0, 10_000, group):
        sample.observe(*range(first, min(first + group, 10_000)))
    assert 32 <= len(sample.values) <= 64 and sample.seen == 10_000
    assert sample.values == list(range(0, 10_000, sample.stride))


def test_counts_of_requests_add_up() -> None:
    total = RequestMetrics()
    for counted in (
        RequestMetrics(request_success_total={"stop": 1}),
        RequestMetrics(request_success_total={"stop": 1}, request_failed_total=2),
        RequestMetrics(request_success_total={"length": 1}, request_refused_total={"invalid": 1}),
    ):
        total.add(counted)
    assert total == RequestMetrics({"invalid": 1}, 2, {"stop": 2, "length": 1})
    assert UnansweredRequests({"invalid": 3}).request_refused_total == {"invalid": 3}
    assert set(METRICS["request_success_total"].values) == set(FINISH_REASONS)


@pytest.mark.parametrize("beam_width", [1, 3])
def test_an_engine_counts_its_tokens_and_the_sequences_of_its_steps(engine: Engine, beam_width: int) -> None:
    engine.metrics.take()
    params = SamplingParams(request_output_len=5, min_length=5, end_ids=(0,), beam_width=beam_width)
    engine.submit(Sequence("counted", [300, 301], params))
    while engine.busy:
        engine.step()
        engine.scheduler.update_gauges()
        assert engine.metrics.num_requests_running <= beam_width
    counted = engine.metrics.take()
    assert counted.generation_tokens_total == sum(counted.step_sequences.values)
    assert counted.step_sequences.values == [1] + [beam_width] * 4
    assert counted.iteration_tokens_total.values == [2] + [beam_width] * 4
    assert len(counted.step_time_seconds.values) == 5
    assert (counted.num_requests_active, counted.kv_cache_used_pages) == (0, 0)


def test_an_engine_counts_prompts_and_what_of_them_the_cache_held(engine: Engine) -> None:
    engine.metrics.take()
    for key in ("first", "second"):
        engine.submit(Sequence(key, PROMPT, SamplingParams(request_output_len=1, end_ids=(0,))))
        while engine.busy:
            engine.step()
    counted = engine.metrics.take()
    assert counted.prompt_tokens_total == counted.prefix_cache_queries_total == 80
    assert counted.prefix_cache_hits_total == 32  # two full pages of the second


def test_the_times_of_a_sequence_add_up(engine: Engine) -> None:
    engine.metrics.take()
    began = time.monotonic()
    params = SamplingParams(request_output_len=8, min_length=8, end_ids=(0,))
    engine.submit(Sequence("timed", [302, 303], params, submitted_at=began - 5))
    while engine.busy:
        engine.step()
    lasted = time.monotonic() - began
    counted = engine.metrics.take()
    (queued,), (first,) = counted.request_queue_time_seconds.values, counted.time_to_first_token_seconds.values
    (whole,), gaps = counted.e2e_request_latency_seconds.values, counted.inter_token_latency_seconds.values
    assert 5 <= queued < first < whole <= 5 + lasted
    assert len(gaps) == 7 and whole == pytest.approx(first + sum(gaps))
    assert sum(counted.step_time_seconds.values) <= lasted


def test_a_cancelled_sequence_counts_its_tokens_and_no_whole_time(engine: Engine) -> None:
    engine.metrics.take()
    engine.submit(Sequence("cancelled", [304], SamplingParams(request_output_len=50, min_length=50, end_ids=(0,))))
    engine.step()
    engine.cancel("cancelled")
    counted = engine.metrics.take()
    assert counted.generation_tokens_total == 1 and not counted.e2e_request_latency_seconds.values
