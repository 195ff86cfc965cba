"""Publishes metrics among Triton's, with the label of the model that does, on a thread of its own.

In Triton 2.51 two threads that update metrics at once crash the server, so one thread does all. An update takes 14 us
or more, so what is counted within an interval is published together.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from gptj_triton.engine.metrics import PREFIX, EngineMetrics, Metric, Metrics, UnansweredRequests, described

INTERVAL = 0.25  # seconds from one round of publishing to the next
RESTARTS = "GPTJ_TRITON_RESTARTS"  # a variable of the launcher's: how often it has started tritonserver again


class PublishedMetrics:
    """What a model counts of its requests, and what its engine counts while this model is the one to publish that."""

    def __init__(self, model: str, requests: type[UnansweredRequests]) -> None:
        """`requests` is what the model counts of its requests."""
        self._model = model
        self._requests = requests
        self._news: queue.SimpleQueue[UnansweredRequests | EngineMetrics | None] = queue.SimpleQueue()
        self._closing = False
        self._hurry = threading.Event()  # ends the wait for the next round
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def count(self, counted: UnansweredRequests) -> None:
        """Add to what the model counts of its requests."""
        self._news.put(counted)

    def take_report(self, report: EngineMetrics | None) -> None:
        """Publish what the engine counted; None says that another model does from now on."""
        self._news.put(report)
        if report is None:
            self._hurry.set()  # or both would for a while

    def close(self) -> None:
        """Publish what is left, and let go of the metrics: in Triton 2.51 a stub that ends with any of them crashes."""
        self._closing = True
        self._news.put(self._requests())  # the thread may wait for news
        self._hurry.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._publish_all()
        except Exception as error:  # a server without metrics is better than none
            pb_utils.Logger.log_warn(f"metrics of {self._model} are not published: {error}")
        while not self._closing:
            self._news.get()

    def _publish_all(self) -> None:
        """Publish what comes until this is closed."""
        requests, engine = _Series(self._model), _Series(self._model)
        try:
            requests.publish(self._requests())
            while not self._closing:
                self._publish([self._news.get(), *self._waiting()], requests, engine)
                self._hurry.wait(INTERVAL)
                self._hurry.clear()
            self._publish(self._waiting(), requests, engine)
        finally:
            requests.close()
            engine.close()

    def _waiting(self) -> list[UnansweredRequests | EngineMetrics | None]:
        return [self._news.get() for _ in range(self._news.qsize())]

    def _publish(
        self, news: Iterable[UnansweredRequests | EngineMetrics | None], requests: _Series, engine: _Series
    ) -> None:
        counted = self._requests()
        for each in news:
            if isinstance(each, UnansweredRequests):
                counted.add(each)
            elif each is None:
                engine.close()
            else:
                if not engine.is_open:
                    engine.publish(EngineMetrics(server_restarts_total=int(os.environ.get(RESTARTS) or 0)))
                engine.publish(each)
        requests.publish(counted)


class _Series:
    """Metrics in Triton, made when they are first published, at zero. For one thread."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, ...], Any] = {}  # by family, and the value of its label
        self._gauges: dict[str, float] = {}

    @property
    def is_open(self) -> bool:
        return bool(self._metrics)

    def publish(self, report: Metrics) -> None:
        """Set gauges, add to counters what has come, and observe the values of histograms."""
        for field, metric in described(type(report)).items():
            value = getattr(report, field)
            if metric.kind == "gauge":
                self._set(PREFIX + field, metric, value)
            elif metric.kind == "histogram":
                histogram = self._metric(PREFIX + field, metric)
                for each in value.values:
                    histogram.observe(each)
            else:
                counts = dict.fromkeys(metric.values, 0) | value if metric.label else {"": value}
                for label_value, count in counts.items():
                    counter = self._metric(PREFIX + field, metric, {metric.label: label_value} if metric.label else {})
                    if count:
                        counter.increment(count)

    def close(self) -> None:
        """Remove the metrics; publishing makes new ones."""
        self._gauges.clear()
        self._metrics.clear()
        self._families.clear()

    def _set(self, name: str, metric: Metric, value: float) -> None:
        if self._gauges.get(name) == value:
            return
        self._gauges[name] = value
        self._metric(name, metric).set(value)
        if metric.twin:
            help_of_all = Metric(metric.kind, metric.twin.help)
            self._metric(metric.twin.family, help_of_all, {metric.twin.label: metric.twin.value}).set(value)

    def _metric(self, family: str, metric: Metric, label: Mapping[str, str] = {}) -> Any:
        """Triton's metric of a family, which has one for each value of its label."""
        key = family, *label.values()
        if key not in self._metrics:
            if family not in self._families:
                kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
                self._families[family] = pb_utils.MetricFamily(name=family, description=metric.help, kind=kind)
            buckets = {"buckets": list(metric.buckets)} if metric.buckets else {}
            labels = {"model": self._model, **label}
            self._metrics[key] = self._families[family].Metric(labels=labels, **buckets)
        return self._metrics[key]
