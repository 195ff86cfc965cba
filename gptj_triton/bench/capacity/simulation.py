"""Requests through one or several replicas behind least connections, and what their clients see."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptj_triton.bench.capacity.replica import Arrival, Replica, Served, Settings
from gptj_triton.bench.capacity.step_times import StepTimes

WARM_UP = 0.1  # of the requests that come first, which find a server emptier than it is later


@dataclass(frozen=True)
class Percentiles:
    """Median and 99th percentile, in milliseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """Zeros where there are none."""
        p50, p99 = 1000 * np.percentile(seconds if len(seconds) else [0.0], [50, 99])
        return cls(float(p50), float(p99))


@dataclass(frozen=True)
class Seen:
    """What clients see. `between_tokens` is over all pairs of tokens, `mean_between` over the requests' own means."""

    requests: int
    refused: int
    first_token: Percentiles
    between_tokens: Percentiles
    mean_between: Percentiles
    whole: Percentiles

    @classmethod
    def of(cls, served: Sequence[Served]) -> Seen:
        figures = {name: Percentiles.of(seconds) for name, seconds in seconds_seen(served).items()}
        return cls(len(served), sum(each.refused for each in served), **figures)


def seconds_seen(served: Sequence[Served]) -> dict[str, Sequence[float]]:
    """All times, in seconds, of which Seen has the percentiles under these names."""
    answered = [each for each in served if not each.refused]
    gaps = [np.diff(each.tokens).tolist() for each in answered if len(each.tokens) > 1]
    return {
        "first_token": [each.tokens[0] - each.arrival.at for each in answered],
        "between_tokens": list(itertools.chain.from_iterable(gaps)),
        "mean_between": [statistics.fmean(each) for each in gaps],
        "whole": [each.ended_at - each.arrival.at for each in answered],
    }


def simulate(
    times: StepTimes, settings: Settings, arrivals: Sequence[Arrival], starts: Sequence[float] = (0.0,), seed: int = 0
) -> tuple[list[Served], list[Replica]]:
    """Every request to the replica that has fewest open among those that have started; `starts` are their moments.

    `arrivals` are in the order of time. All requests have ended at the end. Deterministic by `seed`.
    """
    replicas = [Replica(times, settings, seed + index) for index in range(len(starts))]
    served = []
    for index, arrival in enumerate(arrivals):
        ready = [replica for replica, start in zip(replicas, starts, strict=True) if start <= arrival.at]
        if len(ready) > 1:
            for replica in ready:
                replica.run(arrival.at)
            turn = index % len(ready)  # among equals, each in turn
            ready = ready[turn:] + ready[:turn]
        chosen = min(ready, key=lambda replica: replica.connections(arrival.at)) if len(ready) > 1 else ready[0]
        served.append(chosen.send(arrival))
    for replica in replicas:
        replica.run(math.inf)
    return served, replicas


def settled(served: list[Served]) -> list[Served]:
    """Without the requests of the warm-up."""
    return served[int(len(served) * WARM_UP) :]
