"""How long the steps of a real server on this machine take, and what a request costs outside its engine.

The server runs as it always does, with clients on the same machine, so that what they take from each other is in the
figures. Its engine writes down its steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from gptj_triton.bench.capacity.mix import Mix
from gptj_triton.bench.capacity.open_loop import Texts, closed_loop
from gptj_triton.bench.capacity.recording_engine import read_sizes, read_steps
from gptj_triton.bench.capacity.replica import Served, Settings
from gptj_triton.bench.capacity.step_times import FittedTimes, Step

STAGES = [1, 2, 4, 8, 16, 32, 64, 128]  # clients
STAGE_SECONDS = 2.0
MOST_REQUESTS = 1000  # of a stage


@dataclass(frozen=True)
class Calibration:
    """Steps with their seconds, and the times to first tokens of a client that is alone."""

    steps: list[tuple[Step, float]]
    first_tokens: list[tuple[int, float]]  # tokens of the prompt, seconds

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(self.steps + other.steps, self.first_tokens + other.first_tokens)

    def times(self) -> FittedTimes:
        """ValueError where there are too few steps."""
        return FittedTimes.fit(self.steps)

    def own_seconds(self, times: FittedTimes) -> float:
        """What passes between a client and the engine: the rest of the time to a first token."""
        rest = [seconds - times.formula(Step(0, 0, prompt, 1)) for prompt, seconds in self.first_tokens]
        return max(0.0, median(rest)) if rest else 0.0


def calibrate(
    url: str, recording: Path, mix: Mix, texts: Texts, seed: int, stage: float, stages: Sequence[int]
) -> Calibration:
    """Loads a server, whose engine writes to `recording`, with requests like `mix`: as many clients at once as each of
    `stages` says, for `stage` seconds.
    """
    began = time.monotonic()
    most = read_sizes(recording)["max_sequences"]
    alone: list[Served] = []
    for clients in (number for number in stages if number <= most):
        requests = mix.poisson(1.0, MOST_REQUESTS, seed + clients)
        served = closed_loop(url, clients, stage, requests, texts)
        if clients == 1:
            alone = served
    first_tokens = [(each.arrival.prompt, each.tokens[0] - each.arrival.at) for each in alone if each.tokens]
    return Calibration(steps_between(recording, began, time.monotonic()), first_tokens)


def steps_between(recording: Path, began: float, ended: float) -> list[tuple[Step, float]]:
    """The steps of a time of time.monotonic(), each with the seconds until the next one.

    A step after which the engine may have waited for requests is left out: the next one then decodes nothing.
    """
    return durations([(moment, step) for moment, step in read_steps(recording) if began <= moment <= ended])


def durations(steps: Sequence[tuple[float, Step]]) -> list[tuple[Step, float]]:
    """Each step but the last, with the seconds until the next one, if the engine had work all the time."""
    pairs = itertools.pairwise(steps)
    return [(step, later - moment) for (moment, step), (later, following) in pairs if following.decoding]


def settings_of(recording: Path, own_seconds: float) -> Settings:
    """Those of the server that has written it."""
    return Settings(**read_sizes(recording), steps_ahead=0, own_seconds=own_seconds)
