"""What clients ask for: lengths by a distribution or a log, and arrivals by a Poisson process. Knows no server."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptj_triton.bench.capacity.replica import Arrival

LENGTHS = "fixed:N, uniform:LEAST,MOST or lognormal:MEAN,SIGMA,MOST"
MOST_LENGTH = 1 << 20
LOG_FIELDS = ("prompt_tokens", "output_tokens", "at")


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, by its kind and its numbers: see LENGTHS.

    A lognormal one has the arithmetic mean MEAN and the standard deviation SIGMA of the logarithm, before it is cut to
    1 to MOST tokens.
    """

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """ValueError that says what is allowed."""
        kind, _, rest = text.partition(":")
        counts = {"fixed": 1, "uniform": 2, "lognormal": 3}
        try:
            numbers = tuple(float(number) for number in rest.split(","))
        except ValueError:
            numbers = ()
        if counts.get(kind) != len(numbers):
            raise ValueError(f"{text!r}, expected {LENGTHS}")
        limits = [(1, MOST_LENGTH)] * len(numbers)
        if kind == "lognormal":
            limits[1] = (0, 10)
        for number, (least, most) in zip(numbers, limits, strict=True):
            if not least <= number <= most:
                raise ValueError(f"{text!r}, allowed: {least:,} to {most:,} for {number:g}")
        if kind == "uniform" and numbers[0] > numbers[1]:
            raise ValueError(f"{text!r}, allowed: LEAST up to MOST")
        return cls(kind, numbers)

    def draw(self, chance: random.Random) -> int:
        if self.kind == "fixed":
            return round(self.numbers[0])
        if self.kind == "uniform":
            return chance.randint(*map(round, self.numbers))
        mean, sigma, most = self.numbers
        length = chance.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
        return max(1, min(round(most), round(length)))


@dataclass(frozen=True)
class Mix:
    """Requests to come: their lengths, and how many tokens at the beginning of each prompt are the same for all."""

    draw: Callable[[random.Random], tuple[int, int]]
    shared: int = 0

    def poisson(self, rate: float, count: int, seed: int) -> list[Arrival]:
        """`count` requests at `rate` a second. Another rate with the same seed makes the same requests come at
        other moments, in the same order and proportion.
        """
        gaps, lengths = random.Random(f"gaps {seed}"), random.Random(f"lengths {seed}")
        arrivals, now = [], 0.0
        for _ in range(count):
            now += gaps.expovariate(1.0)
            prompt, output = self.draw(lengths)
            arrivals.append(Arrival(now / rate, prompt, output, min(self.shared, prompt - 1)))
        return arrivals

    def at_once(self, count: int, seed: int) -> list[Arrival]:
        """The same requests, all at the beginning."""
        return [replace(arrival, at=0.0) for arrival in self.poisson(1.0, count, seed)]


def of_lengths(prompt: Lengths, output: Lengths, shared: int = 0) -> Mix:
    return Mix(lambda chance: (prompt.draw(chance), output.draw(chance)), shared)


def of_log(entries: list[Arrival], shared: int = 0) -> Mix:
    """Lengths drawn from those of a log, prompt and output together."""

    def draw(chance: random.Random) -> tuple[int, int]:
        entry = chance.choice(entries)
        return entry.prompt, entry.output

    return Mix(draw, shared)


def read_log(path: Path) -> list[Arrival]:
    """The requests of a file of JSON lines with `prompt_tokens`, `output_tokens` and, if it is known, `at` in seconds.

    Other fields are passed over. `at` of the first one is the beginning; where it is missing, all are at 0. ValueError
    names the line, OSError the file.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                found.append(_entry(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: no line in it, expected JSON with {' and '.join(LOG_FIELDS[:2])}")
    found.sort(key=lambda arrival: arrival.at)
    return [replace(arrival, at=arrival.at - found[0].at) for arrival in found]


def _entry(value: Any) -> Arrival:
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    lengths = []
    for name in LOG_FIELDS[:2]:
        length = value.get(name)
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= MOST_LENGTH:
            raise ValueError(f"{name} is {length!r}, allowed: whole numbers from 1 to {MOST_LENGTH:,}")
        lengths.append(length)
    at = value.get("at", 0.0)
    if not isinstance(at, (int, float)) or isinstance(at, bool) or not math.isfinite(at):
        raise ValueError(f"at is {at!r}, allowed: seconds")
    return Arrival(float(at), lengths[0], lengths[1])
