"""Which sequences take part in the next step, and with how many tokens. First come, first served. Knows no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from gptj_engine.kv_pages import PagePool
from gptj_engine.sequence import Sequence


@dataclass(frozen=True)
class Scheduled:
    """`num_tokens` of a sequence's uncached tokens are computed in the step."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """True when the step computes the last known token, so that a new one can be sampled."""
        return self.num_tokens == self.sequence.num_uncached


class Scheduler:
    """Continuous batching: a sequence may join and leave at any step.

    Sequences that decode come first, one token each. Then prompts are computed in order of arrival, at most
    `step_tokens` tokens a step, so a long prompt never stalls those that decode. When the KV cache is full, the
    sequence that came last gives its pages back and is computed again later; the first one therefore always gets on.
    """

    def __init__(self, pool: PagePool, step_tokens: int, max_sequences: int) -> None:
        self.pool = pool
        self.step_tokens = step_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt and output together must fit the pool, or it could never end."""
        assert self.pool.pages_for(len(sequence.prompt) + sequence.params.request_output_len) <= self.pool.num_pages
        self.waiting.append(sequence)

    def find(self, key: Hashable) -> Sequence | None:
        return next((sequence for sequence in self if sequence.key == key), None)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended and take its pages back."""
        self.pool.release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's work; empty when there is none."""
        step = [Scheduled(sequence, 1) for sequence in list(self.running) if self._can_decode(sequence)]
        prefilling = deque(sequence for sequence in self.running if not sequence.decoding)
        budget = self.step_tokens
        while budget > 0:
            sequence = prefilling.popleft() if prefilling else self._admit()
            if sequence is None:
                break
            num_tokens = min(sequence.num_uncached, budget)
            if not self.pool.grow(sequence, sequence.num_cached + num_tokens):
                break  # those before it will free pages; nobody overtakes it meanwhile
            step.append(Scheduled(sequence, num_tokens))
            budget -= num_tokens
        return step

    def _can_decode(self, sequence: Sequence) -> bool:
        return sequence.decoding and self._make_room(sequence, sequence.num_tokens)

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if all that is known of it fits the free pages."""
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        if self.pool.pages_for(self.waiting[0].num_tokens) > self.pool.num_free:
            return None
        self.running.append(self.waiting.popleft())
        return self.running[-1]

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow `sequence`, preempting later arrivals as needed; false if it had to give way itself."""
        while not self.pool.grow(sequence, num_tokens):
            last = self.running.pop()
            self.pool.release(last)
            self.waiting.appendleft(last)
            if last is sequence:
                return False
        return True
