"""Decides which sequences take part in the next step, and with how many tokens. Requests take turns, and a part of
every step is for the shortest that wait. Knows no tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from gptj_triton.engine.early_starts import EarlyStarts
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sequence import Sequence
from gptj_triton.engine.waiting_line import WaitingLine


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

    Sequences that decode come first, one token each. Then prompts are computed in the order of their turns, at most
    `step_tokens` tokens a step, so a long prompt never stalls those that decode. When the KV cache is full, the group
    whose turn came last gives its pages back and is computed again later; the first one therefore always gets on.

    Short sequences may begin before their turn (see EarlyStarts). Where not all sequences have a place in a step, some
    of the running ones sit out, each in turn.

    `running` is in the order of turns; the beams of a search stand side by side, there and in the line.
    """

    def __init__(self, pool: PagePool, step_tokens: int, max_sequences: int, metrics: EngineMetrics) -> None:
        """Events are counted in `metrics`."""
        self.pool = pool
        self.step_tokens = step_tokens
        self.max_sequences = max_sequences
        self.metrics = metrics
        self.early = EarlyStarts(pool, step_tokens, max_sequences)
        self.line = WaitingLine(self.early.suits)
        self.running: list[Sequence] = []
        self._of_key: dict[Hashable, Sequence] = {}
        self._step: dict[Sequence, int] = {}  # tokens of the step that is being made
        self._next: Hashable = None  # the key of who gets a place first where places lack: it had none the last time
        self._owed = False  # whether that was in the last step

    def __len__(self) -> int:
        return len(self.line) + len(self.running)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.line

    @property
    def begun(self) -> list[Sequence]:
        """The sequences that steps compute now."""
        return [*self.running, *self.early.sequences]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. All that can come of it must fit the pool, or it could never end."""
        assert sequence.params.most_pages(len(sequence.prompt), self.pool.page_size) <= self.pool.num_pages
        self._of_key[sequence.key] = sequence
        self.line.add(sequence)

    def find(self, key: Hashable) -> Sequence | None:
        """A sequence with this `key`, of which there may be several in a group."""
        return self._of_key.get(key)

    def remove(self, group: SequenceOf[Sequence]) -> None:
        """Forget a group that ended and take its pages back."""
        self.replace(group, [])

    def replace(self, group: SequenceOf[Sequence], successors: list[Sequence]) -> None:
        """Put the beams that a step chose in the place of those it began with, whose pages are taken back."""
        for sequence in group:
            self.pool.release(sequence)
        if successors:
            self._of_key[successors[0].key] = successors[0]
            place = self.running.index(group[0])
            self.running[place:place] = successors
        else:
            self._of_key.pop(group[0].key, None)
        self.running = [sequence for sequence in self.running if sequence not in group]
        for sequence in group:
            self.early.discard(sequence)
            self.line.discard(sequence)

    def update_gauges(self) -> None:
        """Set the gauges among the metrics to what is the case now."""
        metrics, pool = self.metrics, self.pool
        metrics.num_requests_running = len(self.running) + len(self.early.sequences)
        metrics.num_requests_waiting = len(self.line) - len(self.early.sequences)
        metrics.num_requests_prefilling = sum(not sequence.token_at for sequence in self.begun)
        metrics.num_requests_active = len(self)
        metrics.num_requests_max = self.max_sequences
        metrics.num_tokens_waiting = self.line.num_tokens
        metrics.kv_cache_pages = pool.num_pages
        metrics.kv_cache_free_pages = pool.num_free
        metrics.kv_cache_used_pages = pool.num_pages - pool.num_free
        metrics.kv_cache_usage_perc = metrics.kv_cache_used_pages / pool.num_pages
        metrics.kv_cache_page_tokens = pool.page_size

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's work; empty when there is none."""
        self.pool.begin_step()
        next_one = self.find(self._next) if self._owed else None
        owed = len(next_one.group) if next_one else 0
        self._step, num_tokens = self.early.schedule(self.line, places=self.max_sequences - owed)
        for sequence in self._with_places():
            if self._can_decode(sequence):
                self._step[sequence] = 1
        self._prefill(self.step_tokens - num_tokens)
        return [Scheduled(sequence, num_tokens) for sequence, num_tokens in self._step.items()]

    def _with_places(self) -> list[Sequence]:
        """The running sequences that have a place in the step; where not all have, those sit out that did so longest
        ago.
        """
        places = self.max_sequences - len(self._step)
        self._owed = len(self.running) > places
        if not self._owed:
            return self.running[:]
        first = next((index for index, sequence in enumerate(self.running) if sequence.key == self._next), 0)
        self._next = None
        chosen: list[Sequence] = []
        for sequence in self.running[first:] + self.running[:first]:
            if sequence is not sequence.group[0]:
                continue  # it goes with the first of its group
            if len(chosen) + len(sequence.group) <= places:
                chosen += sequence.group
            else:
                self._next = sequence.key if self._next is None else self._next
        return chosen

    def _can_decode(self, sequence: Sequence) -> bool:
        ready = all(beam.decoding and not beam.complete for beam in sequence.group)
        return ready and self._make_room(sequence, sequence.num_tokens)

    def _prefill(self, budget: int) -> None:
        """Give `budget` tokens to prompts: to those that were begun, then to those whose turn comes."""
        prefilling = deque(sequence for sequence in self.running if not sequence.decoding)
        while budget > 0 and len(self._step) < self.max_sequences:
            sequence = prefilling.popleft() if prefilling else self._admit()
            if sequence is None:
                break
            begun = self._step.get(sequence, 0)
            num_tokens = min(_prefill_length(sequence) - begun, budget)
            if not self._grow(sequence, sequence.num_cached + begun + num_tokens):
                break  # it waits for pages; later prompts must not overtake it
            if num_tokens:
                self._step[sequence] = begun + num_tokens
            budget -= num_tokens

    def _admit(self) -> Sequence | None:
        """Move the sequence whose turn it is to the running ones, if all that is known of it fits the free pages."""
        sequence = self.line.first
        if sequence is None or self._num_reserved() + _num_becoming(sequence) > self.max_sequences:
            return None
        early = sequence in self.early.sequences
        if not early:
            if sequence.in_flight:  # it had to give way while a step for it was under way
                return None
            self.pool.attach_prefix(sequence)
        missing = self.pool.pages_for(sequence.num_tokens) - len(sequence.pages)
        if not self._has_room(sequence, missing) or (not early and self.pool.is_coming(sequence)):
            if not early:
                self.pool.release(sequence)
            return None
        self.early.discard(sequence)
        self.running.append(self.line.take_first())
        sequence.request.begun = True
        return sequence

    def _num_reserved(self) -> int:
        """Sequences that run, and the beams that searches which have just begun will have."""
        return sum(map(_num_becoming, self.running))

    def _is_first(self, sequence: Sequence) -> bool:
        """Whether a sequence is of the group that must always get on."""
        return not self.running or sequence.group is self.running[0].group

    def _has_room(self, sequence: Sequence, missing: int) -> bool:
        """Whether so many pages are free for a sequence whose turn it is, besides those that are kept."""
        if not self._is_first(sequence):
            pages = len(sequence.pages) if sequence in self.early.sequences else 0
            return missing <= self.pool.num_free - self.early.kept - pages
        while missing > self.pool.num_free:
            if not self._take_kept(sequence):
                return False
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence its pages; those that are kept are for the first of all only."""
        if not self._is_first(sequence):
            return self.pool.grow(sequence, num_tokens, self.early.kept)
        while not self.pool.grow(sequence, num_tokens):
            if not self._take_kept(sequence):
                return False
        return True

    def _take_kept(self, sequence: Sequence) -> bool:
        """Take the pages of one that began before its turn, for the first of all; false where there is none."""
        gone = self.early.give_way(self.line, sequence)
        if gone is None:
            return False
        self._step.pop(gone, None)
        self.metrics.num_preemptions_total += 1
        return True

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow `sequence`, preempting those whose turn came later as needed; false if it had to give way itself."""
        while not self._grow(sequence, num_tokens):
            last = self.running[-1].group
            for member in reversed(last):
                if member in self.running:
                    self.running.remove(member)
                    self.pool.release(member)
                    self.line.put_back(member)
                    self._step.pop(member, None)
                    self.metrics.num_preemptions_total += 1
            if sequence in last:
                return False
        return True


def _num_becoming(sequence: Sequence) -> int:
    """How many sequences this one will become: the beam width for a search that has just begun, else 1."""
    return sequence.params.beam_width if len(sequence.group) == 1 else 1


def _prefill_length(sequence: Sequence) -> int:
    """Tokens to compute before the sequence decodes; a beam's last one waits, to be computed with its siblings'."""
    if sequence.complete:
        return 0
    return sequence.num_uncached - (1 if len(sequence.group) > 1 else 0)
