"""Real load on a real server beside the simulation of the same requests."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.bench.capacity.calibration import Calibration, calibrate, settings_of, steps_between
from gptj_triton.bench.capacity.mix import Mix
from gptj_triton.bench.capacity.open_loop import Texts, open_loop
from gptj_triton.bench.capacity.recording_engine import recording_server
from gptj_triton.bench.capacity.replica import Arrival, Served, Settings
from gptj_triton.bench.capacity.simulation import Seen, seconds_seen, simulate
from gptj_triton.bench.capacity.sizing import Sizing
from gptj_triton.bench.capacity.step_times import FittedTimes
from gptj_triton.bench.machine import OtherPrograms

LEVELS = (0.5, 0.9, 1.5)  # of the capacity
FIGURES = {"first token": "first_token", "between tokens": "between_tokens", "whole": "whole"}
WITHIN = 0.2  # of what is measured


@dataclass(frozen=True)
class Row:
    """One figure at one load, in milliseconds. `predicted` is by the calibrations before and after, `replayed` by the
    steps of the load itself, so that a machine whose speed changes disturbs it less. The measured one lies between
    `low` and `high` by chance: ranks of a binomial distribution, 95 %, of as many values as there were requests.
    """

    level: float
    rate: float
    requests: int
    what: str
    predicted: float
    replayed: float
    measured: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured if self.measured else math.inf

    def __str__(self) -> str:
        return (
            f"{self.level:>5.0%} {self.rate:>7.1f}/s  {self.what:<20} {self.predicted:>9.1f} {self.replayed:>9.1f} "
            f"{self.measured:>9.1f} {self.ratio:>6.2f}   {self.low:.1f} to {self.high:.1f}"
        )


COLUMNS = f"{'predicted':>9} {'replayed':>9} {'measured':>9} {'ratio':>6}   measured, by chance"
HEADING = f"{'load':>5} {'':>9}  {'ms':<20} {COLUMNS}"


@dataclass(frozen=True)
class Level:
    """All figures of a load; `other_cores` is how many cores other programs used meanwhile."""

    rows: list[Row]
    refused_predicted: int
    refused_measured: int
    other_cores: float

    def __str__(self) -> str:
        refused = f"refused: {self.refused_predicted} predicted, {self.refused_measured} measured"
        off = max(abs(row.ratio - 1) for row in self.rows)
        verdict = f"worst {off:.0%} off, {'within' if off <= WITHIN else 'not within'} {WITHIN:.0%}"
        lines = [
            HEADING,
            *map(str, self.rows),
            f"{refused}; other programs used {self.other_cores:.2f} cores; {verdict}",
        ]
        return "\n".join(lines)


def validate(mix: Mix, requests: int, stage: float, stages: Sequence[int], seed: int) -> Iterator[Level | str]:
    """Calibrates, loads and simulates by turns, `requests` requests a level; what is found as soon as it is, and words
    about it. Raises ServerFailedError, or ValueError where too few steps were recorded.
    """
    texts = Texts(seed)
    with tempfile.TemporaryDirectory(prefix="gptj-capacity-") as folder:
        recording = Path(folder, "steps")
        with recording_server(Path(folder), recording) as server:
            calibrate(server.http, recording, mix, texts, seed, stage / 4, stages)  # warms up
            before = calibrate(server.http, recording, mix, texts, seed, stage, stages)
            capacity = capacity_before = _capacity(before, recording, mix, seed)
            yield f"capacity by the first calibration: {capacity:.1f} requests/s"
            for number, level in enumerate(LEVELS):
                arrivals = mix.poisson(level * capacity, requests, seed + number)
                others, began = OtherPrograms(), time.monotonic()
                measured = open_loop(server.http, arrivals, texts)
                other_cores = others.cores()
                own_steps = steps_between(recording, began, time.monotonic())
                after = calibrate(server.http, recording, mix, texts, seed + number + 1, stage, stages)
                capacity_after = _capacity(after, recording, mix, seed)
                yield f"calibrations before and after: {capacity_before:.1f}, {capacity_after:.1f} requests/s"
                around = before + after
                predicted = predict(around, recording, arrivals, seed)
                replayed = predict(Calibration(own_steps, around.first_tokens), recording, arrivals, seed)
                rows = compare(level, level * capacity, predicted, replayed, measured)
                refused = [sum(each.refused for each in served) for served in (predicted, measured)]
                yield Level(rows, refused[0], refused[1], other_cores)
                before, capacity_before = after, capacity_after


def _capacity(calibration: Calibration, recording: Path, mix: Mix, seed: int) -> float:
    return Sizing(*_times_and_settings(calibration, recording), mix, 0.0, seed).saturation().requests


def predict(calibration: Calibration, recording: Path, arrivals: Sequence[Arrival], seed: int) -> list[Served]:
    served, _ = simulate(*_times_and_settings(calibration, recording), arrivals, seed=seed)
    return served


def _times_and_settings(calibration: Calibration, recording: Path) -> tuple[FittedTimes, Settings]:
    times = calibration.times()
    return times, settings_of(recording, calibration.own_seconds(times))


def compare(
    level: float, rate: float, predicted: list[Served], replayed: list[Served], measured: list[Served]
) -> list[Row]:
    """A row for each figure and percentile, of the same requests."""
    seen = [Seen.of(served) for served in (predicted, replayed, measured)]
    seconds = seconds_seen(measured)
    rows = []
    for what, name in FIGURES.items():
        for percent in (50, 99):
            first, second, third = (getattr(getattr(each, name), f"p{percent}") for each in seen)
            low, high = _by_chance(seconds[name], percent / 100, len(measured))
            rows.append(Row(level, rate, len(measured), f"{what}, p{percent}", first, second, third, low, high))
    return rows


def _by_chance(seconds: Sequence[float], share: float, requests: int) -> tuple[float, float]:
    """In milliseconds. Tokens of one request are not independent, so there are as many values as requests."""
    if not seconds or not requests:
        return 0.0, 0.0
    spread = 1.96 * math.sqrt(share * (1 - share) / requests)
    ordered = sorted(seconds)
    low, high = (min(max(share + sign * spread, 0.0), 1.0) * (len(ordered) - 1) for sign in (-1, 1))
    return 1000 * ordered[math.floor(low)], 1000 * ordered[math.ceil(high)]
