"""Remembers what was compiled from the word lists used last. Knows nothing of what they are compiled to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Words = TypeVar("Words", bound=tuple[bytes, ...] | tuple[tuple[int, ...], ...])
Compiled = TypeVar("Compiled")


class CompileCache(Generic[Words, Compiled]):
    """Called with a word list, gives what `make` makes of it; equal lists are compiled once while they are in use.

    The lists kept have `max_size` bytes or token ids in all, or there is one list. For one thread.
    """

    def __init__(self, make: Callable[[Words], Compiled], max_size: int = 1 << 20) -> None:
        self._make = make
        self._max_size = max_size
        self._size = 0
        self._kept: dict[Words, Compiled] = {}  # the list used last comes last

    def __call__(self, words: Words) -> Compiled:
        compiled = self._kept.pop(words, None)
        if compiled is None:
            compiled = self._make(words)
            self._size += _size(words)
        self._kept[words] = compiled
        while self._size > self._max_size and len(self._kept) > 1:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._size -= _size(oldest)
        return compiled


def _size(words: tuple[bytes, ...] | tuple[tuple[int, ...], ...]) -> int:
    return len(words) + sum(map(len, words))
