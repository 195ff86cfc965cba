"""An engine's metrics: what a report holds, and that a histogram's values are reported once."""

from __future__ import annotations

import msgspec
import pytest

from gptj_triton.engine.engine import Engine
from gptj_triton.engine.metrics import METRICS, MOST_OBSERVATIONS, EngineMetrics, observe
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence


def test_every_metric_has_a_kind_and_says_what_it_is() -> None:
    assert set(METRICS) == set(EngineMetrics.__struct_fields__)
    for metric in METRICS.values():
        assert metric.help
        assert bool(metric.buckets) == (metric.kind == "histogram")


def test_a_report_survives_the_way_to_a_frontend() -> None:
    metrics = EngineMetrics(running_sequences=2, generated_tokens=7, step_sequences=[1, 2])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(metrics), type=EngineMetrics) == metrics


def test_values_of_a_histogram_are_reported_once_and_sums_stay() -> None:
    metrics = EngineMetrics(generated_tokens=7, step_sequences=[4])
    report = metrics.take()
    assert (report.generated_tokens, report.step_sequences) == (7, [4])
    assert (metrics.generated_tokens, metrics.step_sequences) == (7, [])
    assert not metrics.differ_from(report)
    observe(metrics.step_sequences, 3)
    assert metrics.differ_from(report)
    assert metrics.without_histograms().step_sequences == [] and metrics.step_sequences == [3]


def test_a_histogram_that_nobody_reads_stops_growing() -> None:
    values: list[int] = []
    for value in range(MOST_OBSERVATIONS + 5):
        observe(values, value)
    assert len(values) == MOST_OBSERVATIONS


@pytest.mark.parametrize("beam_width", [1, 3])
def test_an_engine_counts_its_tokens_and_the_sequences_of_its_steps(engine: Engine, beam_width: int) -> None:
    engine.metrics.take()
    before = engine.metrics.generated_tokens
    params = SamplingParams(request_output_len=5, min_length=5, end_ids=(0,), beam_width=beam_width)
    engine.submit(Sequence("counted", [300, 301], params))
    while engine.busy:
        engine.step()
        engine.scheduler.update_gauges()
        assert engine.metrics.running_sequences <= beam_width
    assert engine.metrics.generated_tokens - before == sum(engine.metrics.step_sequences)
    assert engine.metrics.step_sequences == [1] + [beam_width] * 4
    assert (engine.metrics.running_sequences, engine.metrics.kv_cache_used_pages) == (0, 0)
