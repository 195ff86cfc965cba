"""How long a step takes: a table that a benchmark of a GPU wrote, or a formula fitted to steps that were recorded.

Knows neither engines nor requests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gptj_triton.bench.random_checkpoint import GPTJ_6B
from gptj_triton.checkpoint.data_types import FP8

DECODE = re.compile(r"decode step, batch (\d+), context (\d+)")
FIRST_TOKEN = re.compile(r"first token, (\d+) x (\d+) tokens")
# Of the shorter of the two parts of a GPU's step, prompts and decoding, what it adds to the longer one; they are
# computed beside each other (docs/performance.md: 61.1 ms for what takes 40.4 and 25.5 ms alone).
BESIDE = 0.81
GPU_STEP_TOKENS = 2048  # of the engine that the benchmark measured


@dataclass(frozen=True)
class Step:
    """What is computed at once: `decoding` sequences that attend to `context` tokens in all, and `prompt_tokens` of
    `prompts` prompts, which attend to `prompt_context` tokens before them in all.
    """

    decoding: int
    context: int
    prompt_tokens: int
    prompts: int
    prompt_context: int = 0


class StepTimes(Protocol):
    """Seconds that a step takes. `error` is the median of the relative error at the points that it was made from, and
    `points` is how many there are.
    """

    @property
    def error(self) -> float: ...
    @property
    def points(self) -> int: ...
    def seconds(self, step: Step, chance: random.Random) -> float: ...


class TableTimes:
    """What `benchmark_gpu.py --json` wrote, interpolated.

    A decode step is a part for its batch, interpolated, and one in proportion to its context. Prompts are interpolated
    in their tokens. Beyond the largest measured size the last two go on as a line.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        """ValueError where a decode step at two contexts, or a first token, is missing."""
        self._read(result)
        errors = [
            abs(self._decode(batch, batch * context) / seconds - 1)
            for (batch, context), seconds in self._decodes.items()
        ]
        errors += [abs(self._first_token(*at) / seconds - 1) for at, seconds in self._firsts.items()]
        self.error = float(np.median(errors))
        self.points = len(errors)

    def seconds(self, step: Step, chance: random.Random) -> float:
        decode = self._decode(step.decoding, step.context) if step.decoding else 0.0
        prefill = self._prefill(step.prompt_tokens) if step.prompt_tokens else 0.0
        return max(decode, prefill) + BESIDE * min(decode, prefill)

    def _read(self, result: dict[str, Any]) -> None:
        cache_bytes = 1 if result.get("kv_cache_data_type") == FP8 else 2
        token_bytes = 2 * GPTJ_6B.num_layers * GPTJ_6B.hidden_size * cache_bytes
        measured = {each["what"]: each for each in result["measurements"]}
        firsts = {match: each for what, each in measured.items() if (match := FIRST_TOKEN.fullmatch(what))}
        decodes = {match: each for what, each in measured.items() if (match := DECODE.fullmatch(what))}
        if not firsts or not decodes:
            raise ValueError("no decode steps and first tokens in it, as benchmark_gpu.py writes them")
        weights = next(iter(firsts.values()))["bytes"]
        self._decodes: dict[tuple[int, int], float] = {}
        for match, each in decodes.items():
            context = round((each["bytes"] - weights) / token_bytes)
            self._decodes[int(match[1]), context // int(match[1])] = each["value"] / 1e3
        self._firsts = {(int(match[1]), int(match[2])): each["value"] / 1e3 for match, each in firsts.items()}

        by_batch: dict[int, list[tuple[int, float]]] = {}
        for (batch, context), seconds in sorted(self._decodes.items()):
            by_batch.setdefault(batch, []).append((batch * context, seconds))
        slopes = [
            (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
            for points in by_batch.values()
            if len(points) > 1
        ]
        if not slopes:
            raise ValueError("no decode steps of one batch at two contexts in it")
        self._slope = float(np.median(slopes))
        self._batches = np.array(sorted(by_batch), float)
        self._bases = np.array(
            [np.mean([seconds - self._slope * context for context, seconds in by_batch[batch]]) for batch in by_batch]
        )
        prompts: dict[int, list[float]] = {}
        for (count, length), seconds in self._firsts.items():
            steps = max(1, -(-count * length // GPU_STEP_TOKENS))
            prompts.setdefault(count * length // steps, []).append(seconds / steps)
        self._lengths = np.array(sorted(prompts), float)
        self._prompts = np.array([np.mean(prompts[int(length)]) for length in self._lengths])

    def _decode(self, batch: int, context: int) -> float:
        return _line(batch, self._batches, self._bases) + self._slope * context

    def _prefill(self, tokens: int) -> float:
        return _line(tokens, self._lengths, self._prompts)

    def _first_token(self, count: int, length: int) -> float:
        steps = max(1, -(-count * length // GPU_STEP_TOKENS))
        return steps * self._prefill(count * length // steps)


def _line(x: float, xs: np.ndarray[Any, Any], ys: np.ndarray[Any, Any]) -> float:
    """Interpolated, and extrapolated beyond the last point; before the first it is the first."""
    if x <= xs[-1] or len(xs) == 1:
        return float(np.interp(x, xs, ys))
    return float(ys[-1] + (x - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))


class FittedTimes:
    """A formula whose coefficients were fitted to recorded steps, and how far single steps were from it.

    Seconds are `coefficients` times what `features` gives, times one of `ratios`, drawn by chance: equally many of the
    recorded steps lie between two of them.
    """

    def __init__(self, coefficients: Sequence[float], ratios: Sequence[float], error: float, points: int) -> None:
        self.coefficients = list(coefficients)
        self.ratios = list(ratios)
        self.error = error
        self.points = points

    def seconds(self, step: Step, chance: random.Random) -> float:
        return self.formula(step) * chance.choice(self.ratios)

    def formula(self, step: Step) -> float:
        """Without chance."""
        return sum(map(float.__mul__, self.coefficients, features(step)))

    @classmethod
    def fit(cls, steps: Sequence[tuple[Step, float]]) -> FittedTimes:
        """Least squares of the relative error, of steps with their seconds; those far from it, which something else
        disturbed, are left out of the formula and stay among the ratios. ValueError where there are too few.
        """
        if len(steps) < LEAST_STEPS:
            raise ValueError(f"{len(steps)} steps were recorded, {LEAST_STEPS} at least are needed")
        seconds = np.array([each for _, each in steps])
        matrix = np.array([features(step) for step, _ in steps]) / seconds[:, None]
        kept = np.ones(len(steps), bool)
        for _ in range(3):
            coefficients = _non_negative(matrix[kept], np.ones(int(kept.sum())))
            estimate = matrix @ coefficients  # relative to what was measured
            off = np.abs(np.log(np.maximum(estimate, 1e-9)))
            kept = off <= max(3 * float(np.median(off)), 1e-6)
        ratios = np.quantile(1 / np.maximum(estimate, 1e-3), (np.arange(RATIOS) + 0.5) / RATIOS)
        return cls(coefficients.tolist(), ratios.tolist(), float(np.median(np.abs(estimate - 1))), len(steps))


def features(step: Step) -> tuple[float, ...]:
    """What a step's time is made of: FEATURES."""
    return (
        1.0,
        float(step.decoding),
        float(step.context),
        float(step.prompts > 0),
        float(step.prompts),
        float(step.prompt_tokens),
        float(step.prompt_context),
    )


FEATURES = ("step", "decoding", "context", "with prompts", "prompts", "prompt tokens", "prompt context")
LEAST_STEPS, RATIOS = 50, 500


def _non_negative(matrix: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Least squares without negative coefficients: those that would be are left out, the most negative first."""
    used = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, used], wanted, rcond=None)
        if found.min() >= 0 or len(used) == 1:
            break
        used.pop(int(found.argmin()))
    coefficients = np.zeros(matrix.shape[1])
    coefficients[used] = np.maximum(found, 0)
    return coefficients
