"""When the requests in an engine must end. Knows neither frontends nor answers."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

from gptj_triton.engine.sequence import Sequence

LAST_SECONDS = 5.0  # before a timeout, in which a frontend gets the tokens as they come: a step may outlast it


class Due(NamedTuple):
    """Sequences whose time is over, and those for which the last seconds have begun."""

    over: list[Sequence]
    ending: list[Sequence]


class Deadlines:
    """Moments are those of time.monotonic()."""

    def __init__(self) -> None:
        self._sequences: dict[Hashable, tuple[float, Sequence]] = {}  # by key, with the moment
        self._next = math.inf  # nothing is due before

    def add(self, sequence: Sequence, moment: float) -> None:
        """The sequence must end by then."""
        self._sequences[sequence.key] = moment, sequence
        self._next = min(self._next, moment - LAST_SECONDS)

    def forget(self, key: Hashable) -> None:
        """The sequence has ended, if it was known at all."""
        self._sequences.pop(key, None)

    def take_due(self, now: float) -> Due:
        """What is due; those whose time is over are forgotten, and the others may be told again."""
        due = Due([], [])
        if now < self._next:
            return due
        self._next = math.inf
        for key, (moment, sequence) in list(self._sequences.items()):
            if moment <= now:
                due.over.append(sequence)
                self.forget(key)
            elif moment <= now + LAST_SECONDS:
                due.ending.append(sequence)
                self._next = min(self._next, moment)
            else:
                self._next = min(self._next, moment - LAST_SECONDS)
        return due
