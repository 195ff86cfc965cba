"""Decides which sequences take part in the next step, and with how many tokens. First come, first served. Knows no
tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sequence import Sequence


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
    `step_tokens` tokens a step, so a long prompt never stalls those that decode. When the KV cache is full, the group
    that came last gives its pages back and is computed again later; the first one therefore always gets on.

    Both lists are in order of arrival, the running before the waiting; the beams of a search stand side by side.
    """

    def __init__(self, pool: PagePool, step_tokens: int, max_sequences: int, metrics: EngineMetrics) -> None:
        """Events are counted in `metrics`."""
        self.pool = pool
        self.step_tokens = step_tokens
        self.max_sequences = max_sequences
        self.metrics = metrics
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. All that can come of it must fit the pool, or it could never end."""
        assert sequence.params.most_pages(len(sequence.prompt), self.pool.page_size) <= self.pool.num_pages
        self.waiting.append(sequence)

    def find(self, key: Hashable) -> Sequence | None:
        """A sequence of the request `key`, of which there may be several in a group."""
        return next((sequence for sequence in self if sequence.key == key), None)

    def remove(self, group: SequenceOf[Sequence]) -> None:
        """Forget a group that ended and take its pages back."""
        self.replace(group, [])

    def replace(self, group: SequenceOf[Sequence], successors: list[Sequence]) -> None:
        """Put the beams that a step chose in the place of those it began with, whose pages are taken back."""
        for sequence in group:
            self.pool.release(sequence)
        if successors:
            place = self.running.index(group[0])
            self.running[place:place] = successors
        self.running = [sequence for sequence in self.running if sequence not in group]
        self.waiting = deque(sequence for sequence in self.waiting if sequence not in group)

    def update_gauges(self) -> None:
        """Set the gauges among the metrics to what is the case now."""
        metrics, pool = self.metrics, self.pool
        metrics.num_requests_running = len(self.running)
        metrics.num_requests_waiting = len(self.waiting)
        metrics.num_requests_prefilling = sum(not sequence.token_at for sequence in self.running)
        metrics.num_requests_active = len(self)
        metrics.num_requests_max = self.max_sequences
        metrics.num_tokens_waiting = sum(sequence.num_known for sequence in self.waiting)
        metrics.kv_cache_pages = pool.num_pages
        metrics.kv_cache_free_pages = pool.num_free
        metrics.kv_cache_used_pages = pool.num_pages - pool.num_free
        metrics.kv_cache_usage_perc = metrics.kv_cache_used_pages / pool.num_pages
        metrics.kv_cache_page_tokens = pool.page_size

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's work; empty when there is none."""
        self.pool.begin_step()
        decoding = [sequence for sequence in list(self.running) if self._can_decode(sequence)]
        # A group that had to give way after its first members were chosen decodes no longer.
        step = [Scheduled(sequence, 1) for sequence in decoding if sequence.decoding]
        prefilling = deque(sequence for sequence in self.running if not sequence.decoding)
        budget = self.step_tokens
        while budget > 0:
            sequence = prefilling.popleft() if prefilling else self._admit()
            if sequence is None:
                break
            num_tokens = min(_prefill_length(sequence), budget)
            if not self.pool.grow(sequence, sequence.num_cached + num_tokens):
                break  # it waits for pages; later prompts must not overtake it
            if num_tokens:
                step.append(Scheduled(sequence, num_tokens))
            budget -= num_tokens
        return step

    def _can_decode(self, sequence: Sequence) -> bool:
        ready = all(beam.decoding and not beam.complete for beam in sequence.group)
        return ready and self._make_room(sequence, sequence.num_tokens)

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if all that is known of it fits the free pages."""
        if not self.waiting:
            return None
        sequence = self.waiting[0]
        if self._num_reserved() + _num_becoming(sequence) > self.max_sequences:
            return None
        if sequence.in_flight:  # it had to give way while a step for it was under way
            return None
        self.pool.attach_prefix(sequence)
        missing = self.pool.pages_for(sequence.num_tokens) - len(sequence.pages)
        if missing > self.pool.num_free or self.pool.is_coming(sequence):
            self.pool.release(sequence)
            return None
        self.running.append(self.waiting.popleft())
        return sequence

    def _num_reserved(self) -> int:
        """Sequences that run, and the beams that searches which have just begun will have."""
        return sum(map(_num_becoming, self.running))

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow `sequence`, preempting later arrivals as needed; false if it had to give way itself."""
        while not self.pool.grow(sequence, num_tokens):
            last = self.running[-1].group
            for member in reversed(last):
                if member in self.running:
                    self.running.remove(member)
                    self.pool.release(member)
                    self.waiting.appendleft(member)
                    self.metrics.num_preemptions_total += 1
            if sequence in last:
                return False
        return True


def _num_becoming(sequence: Sequence) -> int:
    """How many sequences this one will become: the beam width for a search that has just begun, else 1."""
    return sequence.params.beam_width if len(sequence.group) == 1 else 1


def _prefill_length(sequence: Sequence) -> int:
    """Tokens to compute before the sequence decodes; a beam's last one waits, to be computed with its siblings'."""
    return sequence.num_uncached - (1 if len(sequence.group) > 1 else 0)
