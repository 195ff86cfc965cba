"""Measurements: times of requests become rates and percentiles. Knows neither servers nor files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptj_triton.bench.comparison.cost import Cost
from gptj_triton.bench.comparison.load import Exchange
from gptj_triton.bench.percentiles import Times, percentiles

ROUNDS = 3  # a measurement has at least: one round alone is as slow as the last request to come


@dataclass(frozen=True)
class Measurement:
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


def make_measurement(
    system: str, clients: int, exchanges: Sequence[Exchange], output_tokens: int, cost: Cost
) -> Measurement:
    """From the first request to the last answer; every answer has `output_tokens` tokens."""
    seconds = max(each.last for each in exchanges) - min(each.sent for each in exchanges)
    return Measurement(
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


def count_equal(texts: Mapping[str, str], others: Mapping[str, str]) -> tuple[int, int]:
    """How many prompts have the same text on both sides, and how many were answered on both."""
    common = texts.keys() & others.keys()
    return sum(texts[prompt] == others[prompt] for prompt in common), len(common)


def fewest_requests(clients: int, at_once: int) -> int:
    """What a measurement needs: ROUNDS full rounds of the requests that the server computes together, one a client."""
    return max(clients, ROUNDS * min(clients, at_once))


def least_seconds(clients: int, at_once: int, alone: float) -> float:
    """How long `fewest_requests` take at best, where one request alone takes `alone` seconds: a round of several is no
    faster."""
    return fewest_requests(clients, at_once) / min(clients, at_once) * alone


def request_count(wanted: int, fewest: int, rate: float, seconds: float) -> int:
    """How many requests a measurement has: `wanted`, but no more than `rate` requests a second make in `seconds`, and
    yet `fewest`."""
    return max(fewest, min(wanted, int(rate * seconds)))
