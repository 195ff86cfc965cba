"""The engine's metrics among Triton's, from both models of the backend."""

from __future__ import annotations

import re

import requests

from gptj_triton.engine.metrics import METRICS, PREFIX
from tests.server.conftest import CLOSE, Server, wait_until

MODELS = ("fastertransformer", "fastertransformer_stream")


def published(server: Server) -> str:
    return str(requests.get(f"http://{server.metrics_url}/metrics", headers=CLOSE, timeout=10).text)


def value(text: str, name: str, model: str) -> float:
    found = re.search(rf'^{name}\{{[^}}]*model="{model}"[^}}]*\}} (\S+)$', text, re.M)
    assert found, name
    return float(found[1])


def test_every_metric_is_published_with_its_kind_and_its_help(server: Server) -> None:
    text = published(server)
    for field, metric in METRICS.items():
        assert f"# TYPE {PREFIX}{field} {metric.kind}\n" in text
        assert f"# HELP {PREFIX}{field} {metric.help}\n" in text


def test_counters_count_and_histograms_observe_what_was_generated(server: Server) -> None:
    before = published(server)
    fields = {"text_input": "Once upon a time", "max_tokens": 9, "min_tokens": 9}
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    assert requests.post(url, json=fields, headers=CLOSE, timeout=60).ok

    def has_grown(name: str, model: str, by: float) -> bool:
        return value(published(server), name, model) >= value(before, name, model) + by

    for model in MODELS:
        wait_until(lambda model=model: has_grown("gptj_generated_tokens", model, 9), "tokens")  # type: ignore[misc]
        wait_until(lambda model=model: has_grown("gptj_step_sequences_sum", model, 9), "steps")  # type: ignore[misc]
        assert has_grown("gptj_step_sequences_count", model, 9)
