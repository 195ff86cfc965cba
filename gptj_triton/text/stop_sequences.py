"""Finds the first of many stop sequences in a text that arrives in parts: strings as bytes, or words as token ids.

This is the automaton of Aho and Corasick (1975, "Efficient string matching", CACM 18.6). Its states are made when a
text first reaches them, so compiling is a sort, and a step costs one dictionary look-up however many sequences there
are. Knows neither tokenizers nor requests.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gptj_triton.text.compile_cache import CompileCache

Items = TypeVar("Items", bytes, tuple[int, ...])


@dataclass(eq=False, slots=True)
class StopState:
    """How a text ends: its last `depth` items, and no more of them, are the beginning of a stop sequence.

    `complete` is the length of the longest stop sequence that the text ends with, 0 if it ends with none. While it is
    0, the last `depth` items can still become a stop sequence.
    """

    depth: int
    complete: int
    first: int  # the sorted sequences from `first` to `last` - 1 begin with these items
    last: int
    shorter: StopState | None  # the same for fewer items at the end: the failure link
    after: dict[int, StopState] = field(default_factory=dict)  # the states that follow, by the next item


class StopSequences(Generic[Items]):
    """A set of stop sequences. A text begins in the state `start`; states can be kept and used again, by any text."""

    def __init__(self, sequences: Iterable[Items]) -> None:
        """`sequences` are all bytes or all tuples of token ids; an empty one matches nothing."""
        self._sequences: list[Items] = sorted(set(sequences))
        self.longest = max(map(len, self._sequences), default=0)
        self.start = StopState(0, 0, 0, len(self._sequences), None)

    def feed(self, state: StopState, items: Iterable[int]) -> tuple[StopState, int]:
        """The state after more of the text, and how many of the `items` were read.

        Reading ends with the item that completes a stop sequence, else with the last one.
        """
        read = 0
        for item in items:
            read += 1
            state = state.after.get(item) or self._make_next(state, item)
            if state.complete:
                break
        return state, read

    def _make_next(self, state: StopState, item: int) -> StopState:
        # A loop, as the chain of shorter endings can be longer than Python's stack.
        endings: list[StopState] = []
        ending: StopState | None = state
        while ending is not None and item not in ending.after:
            endings.append(ending)
            ending = ending.shorter
        found = self.start if ending is None else ending.after[item]
        for ending in reversed(endings):
            found = ending.after[item] = self._longer(ending, item, found)
        return found

    def _longer(self, state: StopState, item: int, shorter: StopState) -> StopState:
        """The state of `state`'s items and `item`, or `shorter` where no stop sequence begins with them."""
        depth = state.depth

        def next_item(sequence: Sequence[int]) -> int:
            return sequence[depth] if len(sequence) > depth else -1

        first = bisect_left(self._sequences, item, state.first, state.last, key=next_item)
        last = bisect_right(self._sequences, item, first, state.last, key=next_item)
        if first == last:
            return shorter
        ends_here = len(self._sequences[first]) == depth + 1
        return StopState(depth + 1, depth + 1 if ends_here else shorter.complete, first, last, shorter)


compile_stop_strings: CompileCache[tuple[bytes, ...], StopSequences[bytes]] = CompileCache(StopSequences)
compile_stop_words: CompileCache[tuple[tuple[int, ...], ...], StopSequences[tuple[int, ...]]] = CompileCache(
    StopSequences
)
