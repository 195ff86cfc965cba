"""What an engine counts of itself. One field is one metric, by the name `gptj_FIELD`; nothing else lists them.

To add one: add a field here, and change it where its event happens. Frontends publish all fields (triton/metrics.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

import msgspec

PREFIX = "gptj_"
MOST_OBSERVATIONS = 4096  # between two reports


@dataclass(frozen=True)
class Metric:
    """`kind` as Prometheus has it: a gauge is a value, a counter a sum so far, a histogram the list of values since the
    last report, which `buckets` (upper bounds) sort.
    """

    kind: Literal["gauge", "counter", "histogram"]
    help: str
    buckets: tuple[float, ...] = ()


class EngineMetrics(msgspec.Struct, tag="metrics"):
    """The engine's metrics, as it sends them to its frontends, which count what an engine cannot: its end."""

    running_sequences: Annotated[int, Metric("gauge", "Sequences that the engine computes")] = 0
    waiting_sequences: Annotated[int, Metric("gauge", "Sequences that wait for the engine to begin")] = 0
    kv_cache_used_pages: Annotated[int, Metric("gauge", "Pages of the KV cache that sequences use")] = 0
    kv_cache_pages: Annotated[int, Metric("gauge", "Pages of the KV cache")] = 0
    generated_tokens: Annotated[int, Metric("counter", "New tokens of all sequences")] = 0
    preemptions: Annotated[int, Metric("counter", "Sequences that gave their pages back, to be computed again")] = 0
    engine_restarts: Annotated[int, Metric("counter", "Engine processes that ended unexpectedly")] = 0
    engine_hangs: Annotated[int, Metric("counter", "Engine processes that were ended for giving no sign of life")] = 0
    step_sequences: Annotated[
        list[int],
        Metric("histogram", "Sequences that got a token in a step", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    ] = msgspec.field(default_factory=list)

    def differ_from(self, report: EngineMetrics) -> bool:
        """Whether anything has changed since `report` was taken."""
        return any(
            getattr(self, name) if metric.kind == "histogram" else getattr(self, name) != getattr(report, name)
            for name, metric in METRICS.items()
        )

    def without_histograms(self) -> EngineMetrics:
        """A copy whose histograms are empty."""
        empty: dict[str, list[int]] = {name: [] for name, metric in METRICS.items() if metric.kind == "histogram"}
        return msgspec.structs.replace(self, **empty)

    def take(self) -> EngineMetrics:
        """A copy to report; the histograms begin anew."""
        report = msgspec.structs.replace(self)
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                setattr(self, name, [])
        return report


def observe(histogram: list[int], value: int) -> None:
    """Add a value to a histogram; values beyond MOST_OBSERVATIONS are dropped, as when nobody takes reports."""
    if len(histogram) < MOST_OBSERVATIONS:
        histogram.append(value)


def _described() -> dict[str, Metric]:
    hints = get_type_hints(EngineMetrics, include_extras=True)
    return {name: next(one for one in hints[name].__metadata__ if isinstance(one, Metric)) for name in hints}


METRICS = _described()  # by field
