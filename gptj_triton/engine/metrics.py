"""What is counted: one field is one metric, by the name `gptj_FIELD`; nothing else lists them.

To add one: add a field here, and change it where its event happens. triton/metrics.py publishes all fields. Names are
those of vLLM's metrics (vllm/v1/metrics/loggers.py) where it has the metric. TensorRT-LLM's backend has some of the
same values under names of its own, which tools for Triton read: such a field has a `twin`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

import msgspec

from gptj_triton.errors import REFUSAL_REASONS

PREFIX = "gptj_"
FINISH_REASONS = ("cancelled", "timeout", "length", "stop")
EVERY, SOME = 4096, 64  # most values that a histogram keeps between two reports

# Upper bounds of buckets, in seconds: of whole requests, and of single steps and tokens.
LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
SHORT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 40)


@dataclass(frozen=True)
class Twin:
    """Another name of a gauge: a family of metrics, and the label that tells it from the others of the family."""

    family: str
    label: str
    value: str
    help: str


@dataclass(frozen=True)
class Metric:
    """`kind` as Prometheus has it. A gauge is a value, a counter what has come since the last report, a histogram a
    Sample of the values since then, which `buckets` (upper bounds) sort.

    A counter with a `label` is a dictionary from the label's values, of which the usual ones are `values`.
    """

    kind: Literal["gauge", "counter", "histogram"]
    help: str
    buckets: tuple[float, ...] = ()
    label: str = ""
    values: tuple[str, ...] = ()
    twin: Twin | None = None


class Sample(msgspec.Struct, array_like=True):
    """A histogram's values since the last report: all, or where there are more than `most` every `stride`-th."""

    most: int
    values: list[float] = msgspec.field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def observe(self, *values: float) -> None:
        self.values += values[-self.seen % self.stride :: self.stride]
        self.seen += len(values)
        while len(self.values) > self.most:
            self.values = self.values[::2]
            self.stride *= 2


class Metrics(msgspec.Struct):
    """Metrics that are reported together."""


def _requests(kind: str) -> Twin:
    return Twin("nv_trt_llm_request_metrics", "request_type", kind, "Requests, as TensorRT-LLM's backend counts them")


def _blocks(kind: str) -> Twin:
    return Twin(
        "nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", kind, "Pages, as TensorRT-LLM's backend counts them"
    )


class EngineMetrics(Metrics, tag="metrics"):
    """An engine's metrics. To it each row of a request, and each returned sequence of a row, is a request."""

    num_requests_running: Annotated[
        int, Metric("gauge", "Sequences that the engine computes", twin=_requests("scheduled"))
    ] = 0
    num_requests_waiting: Annotated[
        int, Metric("gauge", "Sequences that wait for the engine to begin", twin=_requests("waiting"))
    ] = 0
    num_requests_prefilling: Annotated[
        int, Metric("gauge", "Sequences that run and have no token yet", twin=_requests("context"))
    ] = 0
    num_requests_active: Annotated[int, Metric("gauge", "Sequences that run or wait", twin=_requests("active"))] = 0
    num_requests_max: Annotated[int, Metric("gauge", "Most sequences that run at once", twin=_requests("max"))] = 0
    num_tokens_waiting: Annotated[int, Metric("gauge", "Prompt tokens of the sequences that wait")] = 0
    kv_cache_usage_perc: Annotated[
        float, Metric("gauge", "Used part of the KV cache, 0 to 1", twin=_blocks("fraction"))
    ] = 0.0
    kv_cache_pages: Annotated[int, Metric("gauge", "Pages of the KV cache", twin=_blocks("max"))] = 0
    kv_cache_used_pages: Annotated[
        int, Metric("gauge", "Pages of the KV cache that sequences use", twin=_blocks("used"))
    ] = 0
    kv_cache_free_pages: Annotated[
        int, Metric("gauge", "Pages of the KV cache that no sequence uses", twin=_blocks("free"))
    ] = 0
    kv_cache_page_tokens: Annotated[
        int, Metric("gauge", "Tokens that a page of the KV cache holds", twin=_blocks("tokens_per"))
    ] = 0
    prompt_tokens_total: Annotated[int, Metric("counter", "Tokens of the prompts that the engine began with")] = 0
    generation_tokens_total: Annotated[int, Metric("counter", "New tokens of all sequences and beams")] = 0
    prefix_cache_queries_total: Annotated[
        int, Metric("counter", "Prompt tokens that were looked up in the KV cache")
    ] = 0
    prefix_cache_hits_total: Annotated[
        int, Metric("counter", "Prompt tokens that the KV cache held, so that they were not computed again")
    ] = 0
    num_preemptions_total: Annotated[
        int, Metric("counter", "Sequences that gave their pages back, to be computed again")
    ] = 0
    engine_restarts_total: Annotated[int, Metric("counter", "Engine processes that ended unexpectedly")] = 0
    engine_hangs_total: Annotated[
        int, Metric("counter", "Engine processes that were ended for giving no sign of life")
    ] = 0
    server_restarts_total: Annotated[int, Metric("counter", "Times that the launcher started tritonserver again")] = 0
    request_queue_time_seconds: Annotated[
        Sample, Metric("histogram", "Seconds until the engine began with a sequence", LONG)
    ] = msgspec.field(default_factory=lambda: Sample(EVERY))
    time_to_first_token_seconds: Annotated[
        Sample, Metric("histogram", "Seconds until a sequence got its first token", LONG)
    ] = msgspec.field(default_factory=lambda: Sample(EVERY))
    inter_token_latency_seconds: Annotated[
        Sample, Metric("histogram", "Seconds between two tokens of a sequence", SHORT)
    ] = msgspec.field(default_factory=lambda: Sample(SOME))
    e2e_request_latency_seconds: Annotated[
        Sample, Metric("histogram", "Seconds until a sequence ended with stop or length", LONG)
    ] = msgspec.field(default_factory=lambda: Sample(EVERY))
    step_time_seconds: Annotated[Sample, Metric("histogram", "Seconds that the engine took for a step", SHORT)] = (
        msgspec.field(default_factory=lambda: Sample(SOME))
    )
    step_sequences: Annotated[
        Sample, Metric("histogram", "Sequences that got a token in a step", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
    ] = msgspec.field(default_factory=lambda: Sample(SOME))
    iteration_tokens_total: Annotated[
        Sample,
        Metric("histogram", "Tokens that a step computed, of prompts too", (1, 4, 16, 64, 128, 256, 512, 1024, 2048)),
    ] = msgspec.field(default_factory=lambda: Sample(SOME))

    def take(self) -> EngineMetrics:
        """A copy to report; counters and histograms begin anew."""
        report = msgspec.structs.replace(self)
        fresh = EngineMetrics()
        for name, metric in described(EngineMetrics).items():
            if metric.kind != "gauge":
                setattr(self, name, getattr(fresh, name))
        return report

    def has_news(self, report: EngineMetrics) -> bool:
        """Whether anything has happened since `report` was taken."""
        fresh = EngineMetrics()
        return any(
            getattr(self, name) != getattr(report if metric.kind == "gauge" else fresh, name)
            for name, metric in described(EngineMetrics).items()
        )


class UnansweredRequests(Metrics):
    """What a model that only checks requests counts."""

    request_refused_total: Annotated[
        dict[str, int], Metric("counter", "Requests that were refused", label="reason", values=("invalid",))
    ] = msgspec.field(default_factory=dict)
    request_failed_total: Annotated[int, Metric("counter", "Requests that a fault of the server ended")] = 0

    def add(self, other: UnansweredRequests) -> None:
        """Add the counts of another one of the same class."""
        for name in self.__struct_fields__:
            mine, more = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                for value, count in more.items():
                    mine[value] = mine.get(value, 0) + count
            else:
                setattr(self, name, mine + more)


class RequestMetrics(UnansweredRequests):
    """What a model that answers requests counts. To it a request of several rows is one."""

    request_refused_total: Annotated[
        dict[str, int],
        Metric("counter", "Requests that were refused", label="reason", values=("invalid", *REFUSAL_REASONS)),
    ] = msgspec.field(default_factory=dict)
    request_success_total: Annotated[
        dict[str, int],
        Metric(
            "counter",
            "Requests that were answered; of several rows with different reasons the first of these counts",
            label="finished_reason",
            values=FINISH_REASONS,
        ),
    ] = msgspec.field(default_factory=dict)


@functools.cache
def described(metrics: type[Metrics]) -> Mapping[str, Metric]:
    """The metrics that the fields of a class are, by field."""
    hints = get_type_hints(metrics, include_extras=True)
    return {
        name: next(one for one in hints[name].__metadata__ if isinstance(one, Metric))
        for name in metrics.__struct_fields__
    }


METRICS = {**described(RequestMetrics), **described(EngineMetrics)}
