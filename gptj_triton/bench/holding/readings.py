"""What a server says of itself: its metrics. The only place that knows their names."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable

# Nothing is left in the engine when these are 0.
BUSY = ("gptj_num_requests_running", "gptj_num_requests_waiting", "gptj_kv_cache_used_pages")
PAGES = "gptj_kv_cache_pages"
ANSWERED, FAILED = "nv_inference_request_success", "nv_inference_request_failure"  # Triton's, of each model
DOORS = ("ensemble", "ensemble_stream")  # the models that clients ask

Readings = dict[tuple[str, str], float]  # by name and labels


def read_metrics(address: str) -> Readings:
    """All metrics at HOST:PORT. Raises OSError where nothing answers."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://{address}/metrics", timeout=5
    ) as answer:
        text = answer.read().decode()
    found: Readings = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name, _, labels = series.partition("{")
            found[name, labels] = float(value)
    return found


def most(readings: Readings, name: str) -> float:
    """The largest value of a metric, whatever its labels; 0 where there is none."""
    return max((value for (each, _), value in readings.items() if each == name), default=0.0)


def total(readings: Readings, name: str, model: str) -> float:
    """The sum over the labels of one model's metric."""
    return sum(value for (each, labels), value in readings.items() if each == name and f'model="{model}"' in labels)


def counted(readings: Readings) -> tuple[float, float]:
    """How many requests of clients Triton has answered, and how many it has ended with an error."""
    answered, failed = (sum(total(readings, name, model) for model in DOORS) for name in (ANSWERED, FAILED))
    return answered, failed / 2  # Triton 2.51 counts an ensemble's request that ends with an error twice


def is_idle(readings: Readings) -> bool:
    return not any(most(readings, name) for name in BUSY)


async def becomes(condition: Callable[[], bool], within: float, every: float = 0.2) -> bool:
    """Whether `condition` is true at some moment of so many seconds; OSError counts as false."""
    deadline = time.monotonic() + within
    while True:
        try:
            if condition():
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(every)
