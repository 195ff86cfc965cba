"""How many replicas: where one saturates, the most that it can take within the wanted latencies, and how many of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from gptj_triton.bench.capacity.mix import Mix
from gptj_triton.bench.capacity.replica import Arrival, Replica, Settings
from gptj_triton.bench.capacity.simulation import Seen, settled, simulate
from gptj_triton.bench.capacity.step_times import StepTimes

BISECTIONS = 7  # so that a rate is known to 1 % of the saturation
FULL = 0.9  # of the places or pages in use, in the mean, from which these are what is lacking
LEAST_REQUESTS = 1200  # so that more than ten are beyond the 99th percentile
SLICE = 0.1  # seconds, after which a simulation looks whether requests still wait
TOGETHER = 4  # replicas that are simulated together; more are taken to be as many times one


@dataclass(frozen=True)
class Wanted:
    """Most milliseconds, in the 99th percentile; infinite for what does not matter."""

    first_token: float = math.inf
    between_tokens: float = math.inf
    mean_between: float = math.inf

    def met_by(self, seen: Seen) -> bool:
        return (
            not seen.refused
            and seen.first_token.p99 <= self.first_token
            and seen.between_tokens.p99 <= self.between_tokens
            and seen.mean_between.p99 <= self.mean_between
        )


@dataclass(frozen=True)
class Saturation:
    """One replica that always has more to do than it can: what it does a second, and what keeps it from doing more.

    `sequences` and `kv_cache` are how many ran at once and which part of the KV cache was used, in means over time;
    `tokens` are output tokens.
    """

    requests: float
    tokens: float
    sequences: float
    kv_cache: float
    preemptions: int
    step_ms: float
    limit: str


@dataclass(frozen=True)
class Point:
    """What clients of one replica see at a rate of requests a second."""

    rate: float
    seen: Seen


@dataclass(frozen=True)
class Plan:
    """`share` is the most that one replica takes within what is wanted. `points` are the rates that were tried."""

    rate: float
    replicas: int
    share: float
    saturation: Saturation
    points: list[Point]
    seen: Seen


@dataclass(frozen=True)
class Surge:
    """A load that grows at once to `factor` times what it was, and the replicas for it, which serve `delay` seconds
    later. `recovered` is when, in seconds after the growth, the last request came that was refused or whose first
    token took too long. `seen` is by those that came in the first `delay` seconds.
    """

    factor: float
    delay: float
    replicas: tuple[int, int]
    recovered: float
    seen: Seen

    def __str__(self) -> str:
        before, after = self.replicas
        return (
            f"load times {self.factor:g} at once, {before} replicas become {after} after {self.delay:g} s: first token "
            f"p99 {self.seen.first_token.p99:,.0f} ms meanwhile, {self.seen.refused} of {self.seen.requests} refused; "
            f"as wanted again {self.recovered:.0f} s after the growth"
        )


class Sizing:
    """One kind of replica and one mix of requests."""

    def __init__(self, times: StepTimes, settings: Settings, mix: Mix, seconds: float, seed: int) -> None:
        """Each simulation is of `seconds` of load, and of LEAST_REQUESTS at least."""
        self._times = times
        self._settings = settings
        self._mix = mix
        self._seconds = seconds
        self._seed = seed

    def saturation(self) -> Saturation:
        """Of requests that all come at the beginning: what is done as long as some wait, without the first tenth."""
        # So many that the places are full for most of the time.
        count = max(LEAST_REQUESTS, 4 * min(self._settings.max_sequences, self._most_at_once()))
        unlimited = replace(self._settings, max_waiting_requests=1 << 30, max_waiting_tokens=1 << 40)
        replica = Replica(self._times, unlimited, self._seed)
        served = [replica.send(arrival) for arrival in self._mix.at_once(count, self._seed)]
        until = 0.0
        while replica.waiting:
            until += SLICE
            replica.run(until)
        moments = sorted(itertools.chain.from_iterable(each.tokens for each in served))
        first = len(moments) // 10
        tokens = (len(moments) - first) / (moments[-1] - moments[first])
        mean_output = sum(each.arrival.output for each in served) / count
        usage, settings = replica.usage, self._settings
        sequences, kv_cache = usage.sequences / usage.busy, usage.pages / usage.busy / settings.num_pages
        step_ms = 1e3 * usage.busy / usage.steps
        if kv_cache > FULL or usage.preemptions > count / 20:
            limit = "the pages of the KV cache (kv_cache_gib)"
        elif sequences > FULL * settings.max_sequences:
            limit = "the places in a step (max_sequences)"
        else:
            limit = "the time of steps"
        return Saturation(tokens / mean_output, tokens, sequences, kv_cache, usage.preemptions, step_ms, limit)

    def at(self, rate: float, replicas: int = 1) -> Seen:
        """What clients see when `rate` requests a second come to so many replicas."""
        count = max(LEAST_REQUESTS, round(rate * self._seconds))
        arrivals = self._mix.poisson(rate, count, self._seed)
        served, _ = simulate(self._times, self._settings, arrivals, [0.0] * replicas, self._seed)
        return Seen.of(settled(served))

    def plan(self, rate: float, wanted: Wanted) -> Plan | None:
        """For `rate` requests a second; None where not even the lightest load meets what is wanted."""
        saturation = self.saturation()
        points: list[Point] = []

        def tries(share: float) -> bool:
            points.append(Point(share, self.at(share)))
            return wanted.met_by(points[-1].seen)

        low, high = saturation.requests / 2**BISECTIONS, saturation.requests
        if not tries(low):
            return None
        if tries(high):
            low = high
        while high - low > saturation.requests / 2**BISECTIONS:
            middle = (low + high) / 2
            low, high = (middle, high) if tries(middle) else (low, middle)
        replicas = max(1, math.ceil(rate / low))
        points.sort(key=lambda point: point.rate)
        seen = self.at(rate / replicas)
        if replicas <= TOGETHER:
            replicas, seen = self._together(rate, replicas, wanted)
        return Plan(rate, replicas, low, saturation, points, seen)

    def surge(self, plan: Plan, wanted: Wanted, factor: float, delay: float) -> Surge:
        """What becomes of the plan's load when it grows. A large fleet is simulated as one of TOGETHER replicas."""
        before = min(plan.replicas, TOGETHER)
        rate = plan.rate * before / plan.replicas
        after = max(before, math.ceil(factor * before))
        quiet = self._seconds / 4
        calm = self._mix.poisson(rate, max(1, round(rate * quiet)), self._seed)
        begins = calm[-1].at
        busy = self._mix.poisson(rate * factor, round(rate * factor * (2 * delay + quiet)), self._seed + 1)
        arrivals = calm + [replace(arrival, at=begins + arrival.at) for arrival in busy]
        starts = [0.0] * before + [begins + delay] * (after - before)
        served, _ = simulate(self._times, self._settings, arrivals, starts, self._seed)
        late = [
            each.arrival.at - begins
            for each in served[len(calm) :]
            if each.refused or 1e3 * (each.tokens[0] - each.arrival.at) > wanted.first_token
        ]
        meanwhile = [each for each in served if begins <= each.arrival.at < begins + delay]
        return Surge(factor, delay, (before, after), max(late, default=0.0), Seen.of(meanwhile))

    def _together(self, rate: float, replicas: int, wanted: Wanted) -> tuple[int, Seen]:
        """As few replicas as do behind least connections, which share a load more evenly than chance does."""
        seen = self.at(rate, replicas)
        while replicas > 1:
            fewer = self.at(rate, replicas - 1)
            if not wanted.met_by(fewer):
                break
            replicas, seen = replicas - 1, fewer
        return replicas, seen

    def _most_at_once(self) -> int:
        """Requests that fit the KV cache together, about."""
        arrivals: list[Arrival] = self._mix.at_once(100, self._seed)
        pages = sum(-(-(each.prompt + each.output) // self._settings.page_size) for each in arrivals) / len(arrivals)
        return max(1, int(self._settings.num_pages / pages))
