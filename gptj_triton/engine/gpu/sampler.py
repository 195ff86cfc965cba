"""Chooses tokens and beams on the GPU without waiting for them: the host prepares the next step while this one is
computed.

What needs the host (see `can_choose_on_device`, `can_sample_on_device`) is sampled there, and then no step is launched
ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gptj_triton.engine.beam import spread
from gptj_triton.engine.gpu.beam_choice import FEW_OFFERS, choose_beams
from gptj_triton.engine.gpu.beam_state import (
    NUM_FACTS,
    BeamState,
    can_choose_on_device,
    most_offers,
    read_choices,
    search_facts,
    unslotted,
)
from gptj_triton.engine.gpu.sampling import sample as sample_on_device
from gptj_triton.engine.gpu.sampling_state import SamplingState, Work, can_sample_on_device
from gptj_triton.engine.runner import Choice, Started
from gptj_triton.engine.sampler import sample
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sampled, Sequence


class GpuSampler:
    """Keeps one step in flight. `keep_sampled` hands the tokens [places] to the model, for the next step to read."""

    steps_ahead = 1

    def __init__(self, state: SamplingState, beams: BeamState, keep_sampled: Callable[[Tensor], None]) -> None:
        """Compiles the kernels for every kind of request, or the first request of each kind would wait for that."""
        self._state = state
        self._beams = beams
        self._keep_sampled = keep_sampled
        logits = torch.zeros(1, state.vocab_size, device=state.device)
        for work in Work.kinds():
            sample_on_device(logits, state, work)
        nothing = torch.zeros(1, NUM_FACTS.value, dtype=torch.int64, device=state.device)
        for few_offers in (True, False):
            choose_beams(logits, state, beams, nothing, few_offers)

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        """True when the tokens of all of them are chosen on the GPU."""
        return all(self._can_choose(sequence.params) for sequence in sequences)

    def prepare(self, sequences: Iterable[Sequence]) -> None:
        """Let the GPU know of searches that begin again."""
        for beams in unslotted(sequences):
            self._beams.load(beams)

    def start(self, logits: Tensor, sequences: list[Sequence]) -> Started:
        """Begin to choose from float32 `logits` [sequences, V], which the next step may overwrite."""
        here = [sequence if self._can_choose(sequence.params) else None for sequence in sequences]
        on_host = [row for row, sequence in enumerate(here) if sequence is None]
        kept = logits[on_host] if on_host else None
        self._state.load(here)
        tokens, log_probs = sample_on_device(logits, self._state, self._state.work)

        places = sequences[:]
        begun = [sequence for sequence in here if sequence and _begins_search(sequence)]
        searches = self._searches(here, places)
        under_way = [each for row, each in enumerate(places) if row >= len(here) or here[row]]
        for sequence in under_way:
            sequence.in_flight += 1
        results = [tokens, log_probs]
        if searches:
            facts = self._beams.to_device(torch.tensor(searches))
            few_offers = all(
                most_offers(each.params) <= FEW_OFFERS for each in here if each and each.params.beam_width > 1
            )
            results.append(choose_beams(logits, self._state, self._beams, facts, few_offers))
        self._keep_sampled(self._state.tokens[: len(places)])
        on_its_way = [tensor.to("cpu", non_blocking=True) for tensor in results]
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> list[tuple[Sequence, Choice]]:
            arrived.synchronize()
            for sequence in under_way:
                sequence.in_flight -= 1
            pairs = zip(*(tensor.tolist() for tensor in on_its_way[:2]), strict=True)
            chosen: list[tuple[Sequence, Choice]] = [
                (sequence, [Sampled(*pair)])
                for sequence, pair in zip(here, pairs, strict=True)
                if sequence and sequence.params.beam_width == 1
            ]
            if searches:
                steps = read_choices(on_its_way[2].numpy())
                firsts = [sequences[first_row] for first_row, *_ in searches]
                chosen += zip(firsts, steps, strict=True)
            if kept is not None:
                others = [sequences[row] for row in on_host]
                chosen += zip(others, sample(kept, others), strict=True)
            return chosen

        return Started(wait, places, begun)

    def _searches(self, here: list[Sequence | None], places: list[Sequence]) -> list[tuple[int, ...]]:
        """The facts of all searches; puts the beams of those that begin in their `places`."""
        searches: list[tuple[int, ...]] = []
        for row, sequence in enumerate(here):
            if sequence is None or sequence.params.beam_width == 1:
                continue
            if _begins_search(sequence):
                beams = spread(sequence)
                self._beams.take_slot(beams)
                searches.append(search_facts(beams[0], row, 1, len(places)))
                places[row] = beams[0]
                places += beams[1:]
            elif sequence is sequence.group[0]:
                searches.append(search_facts(sequence, row, len(sequence.group), 0))
        return searches

    def _can_choose(self, params: SamplingParams) -> bool:
        if params.beam_width > 1:
            return can_choose_on_device(params, self._state.vocab_size)
        return can_sample_on_device(params)


def _begins_search(sequence: Sequence) -> bool:
    """Whether it is a prompt that becomes the beams of a search in this step."""
    return sequence.params.beam_width > 1 and not sequence.keeps_pages
