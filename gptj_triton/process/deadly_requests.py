"""Counts how often the engine died under a request, so that one that kills it is not computed for ever."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable

import msgspec

from gptj_triton.engine.sampling_params import SamplingParams

COUNT_SECONDS = 600.0  # after which a death is forgotten
MOST_CONTENTS = 4096


class DeadlyRequests:
    """By content: prompt and parameters. Empty, and then without any cost, as long as no engine died."""

    def __init__(self, most_deaths: int) -> None:
        """A request is refused after `most_deaths`, never with 0."""
        self._most_deaths = most_deaths
        self._deaths: dict[bytes, tuple[int, float]] = {}  # how many, and when the last one was; the oldest first

    def count(self, requests: Iterable[tuple[list[int], SamplingParams]]) -> None:
        """The engine died while these were in flight; equal ones count once."""
        if not self._most_deaths:
            return
        self._forget_old()
        now = time.monotonic()
        for content in {_digest(prompt, params) for prompt, params in requests}:
            deaths, _ = self._deaths.pop(content, (0, now))
            self._deaths[content] = deaths + 1, now
        while len(self._deaths) > MOST_CONTENTS:
            self._deaths.pop(next(iter(self._deaths)))

    def clear(self, prompt: list[int], params: SamplingParams) -> None:
        """The request was computed, so it is harmless."""
        if self._deaths:
            self._deaths.pop(_digest(prompt, params), None)

    def deaths_under(self, prompt: list[int], params: SamplingParams) -> int:
        """How many engines died under the request, if that is too many; else 0."""
        if not self._deaths:
            return 0
        self._forget_old()
        deaths, _ = self._deaths.get(_digest(prompt, params), (0, 0.0))
        return deaths if deaths >= self._most_deaths else 0

    def _forget_old(self) -> None:
        now = time.monotonic()
        while self._deaths and next(iter(self._deaths.values()))[1] + COUNT_SECONDS < now:
            self._deaths.pop(next(iter(self._deaths)))


def _digest(prompt: list[int], params: SamplingParams) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode((prompt, params)), digest_size=16).digest()
