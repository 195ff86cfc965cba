"""The metrics among Triton's: each once, with its kind and its help, and in the words of vLLM and of TensorRT-LLM."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable

import pytest
import requests

from gptj_triton.engine.metrics import METRICS, PREFIX, EngineMetrics
from tests.server.conftest import CLOSE, Server, load, wait_until

# Names that dashboards and autoscalers for vLLM read, with another prefix.
OF_VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
    *("request_success_total", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "iteration_tokens_total"),
}
BLOCKS = "nv_trt_llm_kv_cache_block_metrics"


def published(server: Server) -> str:
    return str(requests.get(f"http://{server.metrics_url}/metrics", headers=CLOSE, timeout=10).text)


def series(text: str, family: str, label: str) -> dict[str, float]:
    """The values of a family by those of a label, as Triton reads them for its ORCA header (orca_http.cc)."""
    found = re.findall(rf"{family}(?:{{(.*?)}})?\s*(\d+(?:\.\d+)?)", text)
    return {dict(re.findall(r'(\w+)="([^"]*)"', labels))[label]: float(value) for labels, value in found}


def generate(server: Server, **fields: object) -> requests.Response:
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    return requests.post(url, json={"text_input": "Once upon a time", **fields}, headers=CLOSE, timeout=60)


def test_every_metric_is_published_with_its_kind_and_its_help(server: Server) -> None:
    text = published(server)
    for field, metric in METRICS.items():
        assert f"# TYPE {PREFIX}{field} {metric.kind}\n" in text
        assert f"# HELP {PREFIX}{field} {metric.help}\n" in text
    assert METRICS.keys() >= OF_VLLM


def test_what_the_engine_counts_is_published_once(server: Server) -> None:
    times = Counter(re.findall(rf"^({PREFIX}\w+?|nv_trt_llm\w+?)(?:_count)?{{", published(server), re.M))
    for field in EngineMetrics.__struct_fields__:
        assert times[PREFIX + field] == 1, field


def test_counters_count_and_histograms_observe_what_was_generated(server: Server) -> None:
    before = load(server)
    assert generate(server, max_tokens=9, min_tokens=9).ok

    def grown() -> dict[str, float]:
        return {name.removeprefix(PREFIX): value - before.get(name, 0) for name, value in load(server).items()}

    wait_until(lambda: grown()["generation_tokens_total"] == 9 and grown()["request_success_total"] == 1, "counts")
    now = grown()
    assert now["prompt_tokens_total"] == 4
    for name in ("request_queue_time", "time_to_first_token", "e2e_request_latency"):
        assert now[f"{name}_seconds_count"] == 1
    assert now["inter_token_latency_seconds_count"] == 8
    assert now["step_sequences_sum"] == now["step_sequences_count"] == now["step_time_seconds_count"] == 9
    assert now["iteration_tokens_total_sum"] == 4 + 8
    parts = now["time_to_first_token_seconds_sum"] + now["inter_token_latency_seconds_sum"]
    assert now["e2e_request_latency_seconds_sum"] == pytest.approx(parts)


def test_the_load_is_there_in_tensorrt_llm_s_words(server: Server) -> None:
    text = published(server)
    kinds = series(text, "nv_trt_llm_request_metrics", "request_type")
    assert kinds.keys() == {"active", "max", "scheduled", "context", "waiting"}
    blocks = series(text, BLOCKS, "kv_cache_block_type")
    assert blocks.keys() == {"max", "free", "used", "tokens_per", "fraction"}
    assert blocks["max"] == blocks["used"] + blocks["free"] > 0
    assert blocks["tokens_per"] > 0 and kinds["max"] > 0


def test_a_refusal_is_counted_where_it_is_made(server: Server) -> None:
    def invalid() -> dict[str, float]:
        lines = [line for line in published(server).splitlines() if 'reason="invalid"' in line]
        return series("\n".join(lines), f"{PREFIX}request_refused_total", "model")

    before = invalid()
    assert generate(server, max_tokens=-1).status_code == 400
    tensors = [
        {"name": "input_ids", "datatype": "UINT32", "shape": [1, 1], "data": [2**31]},
        {"name": "input_lengths", "datatype": "UINT32", "shape": [1, 1], "data": [1]},
        {"name": "request_output_len", "datatype": "UINT32", "shape": [1, 1], "data": [1]},
    ]
    url = f"http://{server.http_url}/v2/models/fastertransformer/infer"
    assert requests.post(url, json={"inputs": tensors}, headers=CLOSE, timeout=60).status_code == 400
    expected = before | {name: before[name] + 1 for name in ("preprocessing", "fastertransformer")}
    wait_until(lambda: invalid() == expected, "refusals")


def test_no_count_is_lost_or_doubled_when_the_engine_or_the_server_is_started_again(
    launch: Callable[..., Server],
) -> None:
    server = launch().wait_until_ready()

    def ask(expected_tokens: int, restarts: tuple[int, int]) -> None:
        """Five tokens, after which the sum since tritonserver started, and the restarts, are as expected."""

        def answered() -> bool:
            with contextlib.suppress(requests.ConnectionError):
                return bool(generate(server, max_tokens=5, min_tokens=5).ok)
            return False

        def counted() -> tuple[float, ...]:
            names = ("generation_tokens_total", "engine_restarts_total", "server_restarts_total")
            return tuple(load(server)[PREFIX + name] for name in names)

        wait_until(answered, "answer")
        wait_until(lambda: counted() == (expected_tokens, *restarts), "counts")
        test_what_the_engine_counts_is_published_once(server)

    ask(5, (0, 0))
    (engine,) = server.engines
    engine.kill()
    ask(10, (1, 0))
    (engine,) = server.engines
    tritonserver = server.tritonserver
    assert tritonserver is not None
    tritonserver.kill()
    tritonserver.wait()
    ask(5, (0, 1))
    assert server.engines == [engine], "the engine was to outlive tritonserver"
