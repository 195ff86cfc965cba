"""Beam search: which continuations of a prompt are kept, and when no better one can come. Knows no tensors.

Each step offers, for every beam, its best next tokens. The best of all these go on as the new beams; those that end
join the pool of finished hypotheses, which keeps the `beam_width` best by log-probability / length ** len_penalty,
where the length counts new tokens. The search ends when no running beam can beat the worst of a full pool any more, so
a longer hypothesis that scores better is never missed for a shorter one that ended first.

Source of the algorithm: Wu et al. (2016), arXiv:1609.08144, section 7; of the diversity rate, which is added for each
rank among the continuations of one beam: Li et al. (2016), arXiv:1611.08562, with FasterTransformer's sign.

On the host, `advance` chooses, and a beam that goes on shares the pages of the one that it continues. A GPU chooses the
same without the host (engine/gpu/beam_choice.py); here `follow` then notes a step late what it chose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sampled, Sequence


@dataclass(frozen=True)
class Branch:
    """One step's continuation of a beam: `beam` has taken its new token, `parent` has the pages."""

    parent: Sequence
    beam: Sequence


@dataclass(frozen=True)
class BeamStep:
    """One step's choice that was made elsewhere, best first: the continuations that go on, as many as there are beams,
    and those that ended. Each names the place of the beam that it continues.
    """

    going_on: list[tuple[int, Sampled]]
    ended: list[tuple[int, Sampled]]


def most_searches(max_sequences: int) -> int:
    """How many searches can have pages at once: each has two beams at least, but the last to begin again may have only
    the first of them there yet.
    """
    return (max_sequences + 1) // 2


def spread(prompt: Sequence) -> list[Sequence]:
    """All beams of a search that begins, none with a token yet, for a GPU that chooses them: they are its `group`, and
    each is to get pages of its own.
    """
    beams = [prompt.copy() for _ in range(prompt.params.beam_width)]
    for beam in beams:
        beam.keeps_pages, beam.group = True, beams
    prompt.group = beams
    return beams


@dataclass
class BeamSearch:
    """The finished hypotheses of one search."""

    params: SamplingParams
    finished: list[Sequence] = field(default_factory=list)

    def advance(self, candidates: list[tuple[Sequence, list[Sampled]]], token_bytes: list[bytes]) -> list[Branch]:
        """Extend each beam by its best next tokens, best first, and choose; returns the beams that go on, best first.

        The search has ended when none does; `finished` then holds its result.
        """
        width = self.params.beam_width
        rate = self.params.beam_search_diversity_rate
        offers = [
            (parent.cum_log_prob + sampled.log_prob + rate * rank, parent, sampled)
            for parent, choices in candidates
            for rank, sampled in enumerate(choices)
        ]
        offers.sort(key=lambda offer: -offer[0])
        going_on: list[Branch] = []
        for place, (_, parent, sampled) in enumerate(offers[: self.params.beam_choices]):
            if len(going_on) == width:
                break  # at least `width` offers were seen, and no later one may end
            beam = parent.copy()
            beam.append(sampled.token, sampled.log_prob, token_bytes)
            if beam.finish_reason is None:
                going_on.append(Branch(parent, beam))
            elif place < width:
                self._finish(beam)
        if not going_on or self._cannot_improve([branch.beam for branch in going_on]):
            return []
        return going_on

    def follow(self, step: BeamStep, beams: list[Sequence], token_bytes: list[bytes]) -> bool:
        """Move the tokens of `beams` as a GPU has chosen, while pages stay with their beams; false if the search has
        ended, `finished` then holds its result.
        """
        for parent, sampled in step.ended:
            hypothesis = beams[parent].copy()
            hypothesis.append(sampled.token, sampled.log_prob, token_bytes)
            self._finish(hypothesis)
        if len(step.going_on) < len(beams):  # none, unless logits are no numbers
            return False
        before = [(beam.output, beam.log_probs) for beam in beams]
        for beam, (parent, sampled) in zip(beams, step.going_on, strict=True):
            output, log_probs = before[parent]
            beam.output, beam.log_probs = [*output, sampled.token], [*log_probs, sampled.log_prob]
        return not self._cannot_improve(beams)

    def result(self) -> list[Sequence]:
        """The `beam_width` best hypotheses, best first; the last one repeated if there are not that many."""
        missing = self.params.beam_width - len(self.finished)
        return self.finished + self.finished[-1:] * missing

    def _finish(self, beam: Sequence) -> None:
        self.finished.append(beam)
        self.finished.sort(key=lambda hypothesis: -self._score(hypothesis, len(hypothesis.output)))
        del self.finished[self.params.beam_width :]

    def _cannot_improve(self, beams: list[Sequence]) -> bool:
        if len(self.finished) < self.params.beam_width:
            return False
        worst = self._score(self.finished[-1], len(self.finished[-1].output))
        lengths = (len(beams[0].output) + 1, self.params.request_output_len)
        return all(self._score(beam, length) <= worst for beam in beams for length in lengths)

    def _score(self, beam: Sequence, length: int) -> float:
        """Score of `beam` if its log-probability were that of `length` tokens."""
        return beam.cum_log_prob / math.pow(length, self.params.len_penalty)
