"""Publishes the engine's metrics among Triton's, with the label of the model that publishes them."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from gptj_triton.engine.metrics import METRICS, PREFIX, EngineMetrics, Metric


class PublishedMetrics:
    """All fields of EngineMetrics. One thread at a time may publish: in Triton 2.51 two that update a metric at once
    crash the server.
    """

    def __init__(self, model_name: str) -> None:
        self._published = {field: self._create(PREFIX + field, metric, model_name) for field, metric in METRICS.items()}
        self._last = EngineMetrics()

    def publish(self, report: EngineMetrics) -> None:
        """Set gauges, add to counters what is new, and observe the values of histograms."""
        for field, (_, metric) in self._published.items():
            value, last = getattr(report, field), getattr(self._last, field)
            kind = METRICS[field].kind
            if kind == "gauge":
                metric.set(value)
            elif kind == "counter":
                metric.increment(value - last if value >= last else value)  # a new engine counts from 0
            else:
                for each in value:
                    metric.observe(each)
        self._last = report

    def close(self) -> None:
        """Let go of the metrics while Triton still answers: in Triton 2.51 a stub that ends with
        any of them crashes."""
        while self._published:
            _, (family, metric) = self._published.popitem()
            del metric
            del family

    @staticmethod
    def _create(name: str, metric: Metric, model_name: str) -> tuple[Any, Any]:
        """Triton's family and its one metric; a metric ends with its family."""
        kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
        family = pb_utils.MetricFamily(name=name, description=metric.help, kind=kind)
        buckets = {"buckets": list(metric.buckets)} if metric.buckets else {}
        return family, family.Metric(labels={"model": model_name}, **buckets)
