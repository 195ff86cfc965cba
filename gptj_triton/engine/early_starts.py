"""Short sequences that begin before their turn, on what is kept for them: pages, places in a step, a part of its prompt
tokens. So a short request waits for a step or two, however much waits and runs.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools

from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.sequence import Sequence
from gptj_triton.engine.waiting_line import WaitingLine

PAGES = 64  # one of so many pages is kept
PLACES = 4  # one of so many places in a step can be taken
TOKENS = 2  # one of so many prompt tokens of a step
MOST_IN_VAIN = 8  # sequences that are looked at in a step and cannot begin


class EarlyStarts:
    """Sequences that have begun and still wait for their turn. Of these, and of those that wait, the one whose
    request has the fewest tokens left is always the first; when its turn comes, a sequence goes on among the running
    ones.

    A new one may take half of the pages that are left of those kept, so that some are left for a shorter one.
    """

    def __init__(self, pool: PagePool, step_tokens: int, max_sequences: int) -> None:
        self.sequences: dict[Sequence, None] = {}
        self.kept = self._pages = pool.num_pages // PAGES
        self._pool = pool
        self._places = max(1, max_sequences // PLACES)
        self._tokens = step_tokens // TOKENS

    def suits(self, sequence: Sequence) -> bool:
        """Whether a sequence is short enough ever to begin early. A search that branches never is."""
        params = sequence.params
        return self._pages_of(sequence) <= _part(self._pages) and (
            params.beam_width == 1 or params.request_output_len == 1
        )

    def schedule(self, line: WaitingLine, places: int) -> tuple[dict[Sequence, int], int]:
        """What the step computes of these sequences and of those that begin now, at most `places`; and how many tokens
        of prompts that takes.
        """
        step: dict[Sequence, int] = {}
        budget, in_vain = self._tokens, 0
        places = min(places, self._places)
        begun = sorted(self.sequences, key=_tokens_left)
        with contextlib.closing(line.shortest(self.sequences)) as waiting:
            few = itertools.takewhile(lambda sequence: budget > 0 and in_vain < MOST_IN_VAIN, waiting)
            for sequence in heapq.merge(begun, few, key=_tokens_left):
                if len(step) == places:
                    break
                if sequence.complete or (budget == 0 and not sequence.decoding):
                    continue
                if sequence not in self.sequences and not self._begin(sequence):
                    in_vain += 1
                    continue
                num_tokens = 1 if sequence.decoding else min(sequence.num_uncached, budget)
                if not self._pool.grow(sequence, sequence.num_cached + num_tokens):
                    self._end(sequence, line)  # the first of all sequences took what was kept
                    continue
                budget -= 0 if sequence.decoding else num_tokens
                step[sequence] = num_tokens
        self._count()
        return step, self._tokens - budget

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, or whose turn has come."""
        if self.sequences.pop(sequence, self) is None:
            self._count()

    def give_way(self, line: WaitingLine, to: Sequence) -> Sequence | None:
        """Let the sequence that began last give its pages back, and return it; None where there is none but `to`."""
        last = next((each for each in reversed(self.sequences) if each is not to), None)
        if last is not None:
            self._end(last, line)
            self._count()
        return last

    def _begin(self, sequence: Sequence) -> bool:
        left = self._pages - sum(map(self._pages_of, self.sequences))
        if self._pages_of(sequence) > min(_part(left), self._pool.num_free) or sequence.in_flight:
            return False
        self._pool.attach_prefix(sequence)
        if self._pool.is_coming(sequence):
            self._pool.release(sequence)
            return False
        self.sequences[sequence] = None
        sequence.request.begun = True
        return True

    def _end(self, sequence: Sequence, line: WaitingLine) -> None:
        del self.sequences[sequence]
        self._pool.release(sequence)
        line.begin_again(sequence)

    def _pages_of(self, sequence: Sequence) -> int:
        """Pages that it needs at its end."""
        return self._pool.pages_for(len(sequence.prompt) + sequence.params.request_output_len)

    def _count(self) -> None:
        """Set `kept`: pages that only these sequences may take."""
        self.kept = max(0, self._pages - sum(len(sequence.pages) for sequence in self.sequences))


def _part(pages: int) -> int:
    """Of the pages that are left, those that one sequence may take."""
    return max(min(1, pages), pages // 2)


def _tokens_left(sequence: Sequence) -> int:
    return sequence.request.num_tokens - sequence.num_cached
