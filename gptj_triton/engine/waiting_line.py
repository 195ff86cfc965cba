"""Who waits, and who is next: clients' requests take turns, a sequence each. Knows neither pages nor steps.

A request of many rows thus gets as many turns as one of a single row. Nothing here takes longer when more wait, but for
the logarithm of a heap.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Container, Generator, Iterator
from dataclasses import dataclass, field

from gptj_triton.engine.sequence import Request, Sequence

MOST_GONE = 64  # requests that have left the line but not the heap, besides as many as wait


@dataclass(eq=False)
class Waiting:
    """What waits of one request, in order."""

    request: Request
    sequences: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    in_heap: bool = False


class WaitingLine:
    """Sequences whose turn has not come; a sequence may begin before its turn, and stays in line meanwhile.

    `num_tokens` counts the prompts of all, and the tokens that they may generate.
    """

    def __init__(self, may_begin_early: Callable[[Sequence], bool]) -> None:
        """`may_begin_early` says of which sequences `shortest` is to tell."""
        self.num_tokens = 0
        self._may_begin_early = may_begin_early
        self._requests: OrderedDict[Request, Waiting] = OrderedDict()
        self._size = 0
        self._by_length: list[tuple[int, int, Waiting]] = []  # a heap; the number decides between equal lengths
        self._new: list[Waiting] = []  # not in the heap yet: more sequences may come
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, request by request."""
        for waiting in self._requests.values():
            yield from waiting.sequences

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def first(self) -> Sequence | None:
        """The sequence whose turn it is."""
        return next(iter(next(iter(self._requests.values())).sequences)) if self._requests else None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its request, and a new request behind all others."""
        self._enter(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Put a sequence before all others."""
        waiting = self._enter(sequence)
        waiting.sequences.move_to_end(sequence, last=False)
        self._requests.move_to_end(sequence.request, last=False)

    def take_first(self) -> Sequence:
        """Let the first sequence leave. The turn passes to the next request, unless more of the same group wait."""
        sequence = self.first
        assert sequence is not None
        self.discard(sequence)
        following = self.first
        if sequence.request in self._requests and (following is None or following.group is not sequence.group):
            self._requests.move_to_end(sequence.request)
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence, if it waits."""
        waiting = self._requests.get(sequence.request)
        if waiting is None or sequence not in waiting.sequences:
            return
        del waiting.sequences[sequence]
        self.num_tokens -= sequence.most_tokens
        self._size -= 1
        if not waiting.sequences:
            del self._requests[sequence.request]

    def shortest(self, begun: Container[Sequence]) -> Generator[Sequence]:
        """The next sequence of each request that is not among `begun`, the request of fewest tokens first. To be closed
        before another call.
        """
        for waiting in self._new:
            self._push(waiting)
        self._new.clear()
        looked_at = []
        try:
            while self._by_length:
                entry = heapq.heappop(self._by_length)
                sequence = next((each for each in entry[2].sequences if each not in begun), None)
                entry[2].in_heap = sequence is not None and self._may_begin_early(sequence)
                if sequence is not None and entry[2].in_heap:
                    looked_at.append(entry)
                    yield sequence
        finally:
            for entry in looked_at:
                heapq.heappush(self._by_length, entry)

    def begin_again(self, sequence: Sequence) -> None:
        """Note that a sequence that had begun before its turn has not any more."""
        self._list(self._requests[sequence.request])

    def _enter(self, sequence: Sequence) -> Waiting:
        waiting = self._requests.setdefault(sequence.request, Waiting(sequence.request))
        waiting.sequences[sequence] = None
        self.num_tokens += sequence.most_tokens
        self._size += 1
        if self._may_begin_early(sequence):
            self._list(waiting)
        return waiting

    def _list(self, waiting: Waiting) -> None:
        if not waiting.in_heap:
            waiting.in_heap = True
            self._new.append(waiting)

    def _push(self, waiting: Waiting) -> None:
        if len(self._by_length) > 2 * len(self._requests) + MOST_GONE:
            self._by_length = [entry for entry in self._by_length if entry[2].sequences]
            heapq.heapify(self._by_length)
        heapq.heappush(self._by_length, (waiting.request.num_tokens, next(self._numbers), waiting))
