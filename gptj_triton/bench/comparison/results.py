"""What was measured, as rows: times of requests become rates and percentiles. Knows neither servers nor files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptj_triton.bench.comparison.cost import Cost
from gptj_triton.bench.comparison.load import Exchange

PERCENTILES = (50, 90, 99)
Times = tuple[float, float, float]  # PERCENTILES in milliseconds


@dataclass(frozen=True)
class Row:
    """One system at one number of clients. Times of a system that does not stream have its whole answer as the first
    token."""

    system: str
    clients: int
    requests: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float  # new ones
    latency_ms: Times
    first_token_ms: Times
    cores: float
    generator_cores: float
    other_cores: float
    memory_mib: float
    gpu_load_percent: float | None
    gpu_memory_mib: float | None


def make_row(system: str, clients: int, exchanges: Sequence[Exchange], output_tokens: int, cost: Cost) -> Row:
    """From the first request to the last answer; every answer has `output_tokens` tokens."""
    seconds = max(each.last for each in exchanges) - min(each.sent for each in exchanges)
    return Row(
        system,
        clients,
        len(exchanges),
        seconds,
        requests_per_second=len(exchanges) / seconds,
        tokens_per_second=len(exchanges) * output_tokens / seconds,
        latency_ms=percentiles([each.last - each.sent for each in exchanges]),
        first_token_ms=percentiles([each.first - each.sent for each in exchanges]),
        cores=cost.cpu_seconds / seconds,
        generator_cores=cost.generator_cpu_seconds / seconds,
        other_cores=cost.other_cores,
        memory_mib=cost.memory_mib,
        gpu_load_percent=cost.gpu_load_percent,
        gpu_memory_mib=cost.gpu_memory_mib,
    )


def percentiles(seconds: Sequence[float]) -> Times:
    p50, p90, p99 = 1000 * np.percentile(seconds, PERCENTILES)
    return float(p50), float(p90), float(p99)


def count_equal(texts: Mapping[str, str], others: Mapping[str, str]) -> tuple[int, int]:
    """How many prompts have the same text on both sides, and how many were answered on both."""
    common = texts.keys() & others.keys()
    return sum(texts[prompt] == others[prompt] for prompt in common), len(common)


def request_count(clients: int, each: int, fewest: int, rate: float, seconds: float) -> int:
    """How many requests a measurement has: `each` a client and `fewest` at least, but no more than `rate` requests a
    second make in `seconds`, and yet one a client."""
    wanted = max(clients * each, fewest)
    return max(clients, min(wanted, int(rate * seconds)))
