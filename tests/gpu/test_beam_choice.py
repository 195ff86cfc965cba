"""Beams that the GPU chooses are those that the host chooses, step after step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from gptj_triton.engine.beam import BeamSearch, spread
from gptj_triton.engine.gpu.beam_choice import FEW_OFFERS, choose_beams
from gptj_triton.engine.gpu.beam_state import (
    MOST_BEAMS,
    BeamState,
    can_choose_on_device,
    most_offers,
    read_choices,
    search_facts,
)
from gptj_triton.engine.gpu.sampling import sample as sample_on_device
from gptj_triton.engine.gpu.sampling_state import Blocks, SamplingState
from gptj_triton.engine.sampler import sample
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence

VOCABULARY = 301
SMALL = Blocks(chunk=64, group=16, groups=32, whole=64)


class Pair:
    """One search on the host and the same on the GPU."""

    def __init__(self, params: SamplingParams, prompt: list[int]) -> None:
        self.params = params
        self.on_host = [Sequence("host", prompt, params)]
        self.on_gpu = [Sequence("gpu", prompt, params)]
        self.search, self.twin = BeamSearch(params), BeamSearch(params)
        self.ended = False
        self.owners: list[list[int]] = [[]] * params.beam_width  # of each beam's tokens on the GPU


def logits_of(pairs: list[Pair], step: int, device: torch.device) -> torch.Tensor:
    """[rows, V]: of each beam a function of its tokens; end ids are likely."""
    rows = []
    for pair in pairs:
        for beam in pair.on_host:
            seed = hash((tuple(beam.output), step)) % 2**31
            row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
            row[list(pair.params.end_ids)] += 3
            rows.append(row)
    return torch.stack(rows).to(device)


def advance_on_gpu(pairs: list[Pair], logits: torch.Tensor, state: SamplingState, beams: BeamState) -> list[bool]:
    """Whether each search goes on."""
    rows = [sequence for pair in pairs for sequence in pair.on_gpu]
    state.load(rows)
    sample_on_device(logits, state, state.work)
    facts: list[tuple[int, ...]] = []
    row, rest_place = 0, len(rows)
    for pair in pairs:
        num_rows = len(pair.on_gpu)
        if not pair.on_gpu[0].keeps_pages:
            pair.on_gpu = spread(pair.on_gpu[0])
            beams.take_slot(pair.on_gpu)
            facts.append(search_facts(pair.on_gpu[0], row, 1, rest_place))
            rest_place += len(pair.on_gpu) - 1
        else:
            facts.append(search_facts(pair.on_gpu[0], row, num_rows, 0))
        row += num_rows
    few = all(most_offers(pair.params) <= FEW_OFFERS for pair in pairs)
    choices = choose_beams(logits, state, beams, torch.tensor(facts, device=logits.device), few)
    steps = read_choices(choices.cpu().numpy())
    for pair, step in zip(pairs, steps, strict=True):
        pair.owners = [[*pair.owners[parent], place] for place, (parent, _) in enumerate(step.going_on)]
    goes_on = [pair.twin.follow(step, pair.on_gpu, []) for pair, step in zip(pairs, steps, strict=True)]
    for step, (first_row, num_rows, width, _, place, *_) in zip(steps, facts, strict=True):
        places = (
            range(first_row, first_row + num_rows)
            if num_rows == width
            else [first_row, *range(place, place + width - 1)]
        )
        for where, (_, sampled) in zip(places, step.going_on, strict=False):
            assert int(state.tokens[where]) == sampled.token
    return goes_on


def check(made: list[SamplingParams], device: torch.device) -> None:
    pairs = [Pair(params, [3, number]) for number, params in enumerate(made)]
    state = SamplingState(sum(params.beam_width for params in made), VOCABULARY, device, SMALL)
    slots = len(made) + 1
    beams = BeamState(torch.zeros(slots, MOST_BEAMS.value, 64, dtype=torch.uint8, device=device))
    step = 0
    while going := [pair for pair in pairs if not pair.ended]:
        logits = logits_of(going, step, device)
        rows = [sequence for pair in going for sequence in pair.on_host]
        candidates = list(zip(rows, sample(logits.clone(), rows), strict=True))
        goes_on = advance_on_gpu(going, logits, state, beams)
        for pair, on in zip(going, goes_on, strict=True):
            own, candidates = candidates[: len(pair.on_host)], candidates[len(pair.on_host) :]
            pair.on_host = [branch.beam for branch in pair.search.advance(own, [])]
            assert on == bool(pair.on_host)
            if not on:
                pair.ended = True
                continue
            assert [beam.output for beam in pair.on_gpu] == [beam.output for beam in pair.on_host]
            slot = pair.on_gpu[0].search_slot
            width, length = len(pair.on_gpu), len(pair.on_gpu[0].output)
            owners = beams.cache_indirection[slot, :width, :length].tolist()
            assert owners == pair.owners
            totals = beams.cum_log_probs[slot, :width].tolist()
            assert totals == pytest.approx([beam.cum_log_prob for beam in pair.on_host], abs=1e-4)
        step += 1
    for pair in pairs:
        assert [beam.output for beam in pair.twin.result()] == [beam.output for beam in pair.search.result()]
        assert [b.finish_reason for b in pair.twin.result()] == [b.finish_reason for b in pair.search.result()]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**dict[str, Any](request_output_len=6, end_ids=(7,), beam_width=4) | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beam_width": 2, "request_output_len": 2},
        {"beam_width": 16, "request_output_len": 2},
        {"end_ids": (7, 8, 300, 0), "request_output_len": 4},
        {"beam_width": 3, "end_ids": ()},
        {"len_penalty": 1.0, "temperature": 0.7},
        {"len_penalty": -1.0, "beam_search_diversity_rate": -0.5},
        {"min_length": 3, "end_ids": (7, 9)},
        {"runtime_top_k": 5, "temperature": 0.0},
    ],
)
def test_beams_are_those_of_the_host(fields: dict[str, Any], device: torch.device) -> None:
    check([params(**fields)], device)


def test_searches_of_many_kinds_share_a_batch_and_end_apart(device: torch.device) -> None:
    chance = random.Random(5)
    made = [
        params(
            beam_width=chance.choice([2, 3, 4]),
            request_output_len=chance.randint(2, 5),
            end_ids=tuple(chance.sample(range(VOCABULARY), chance.randint(0, 2))),
            len_penalty=chance.choice([0.0, 1.0]),
        )
        for _ in range(4)
    ]
    check(made, device)


@pytest.mark.parametrize("end_ids", [(7,), (VOCABULARY - 1,)])
def test_logits_that_are_no_numbers_give_tokens_of_the_vocabulary(
    end_ids: tuple[int, ...], device: torch.device
) -> None:
    pair = Pair(params(end_ids=end_ids), [3])
    state = SamplingState(4, VOCABULARY, device, SMALL)
    beams = BeamState(torch.zeros(1, MOST_BEAMS.value, 64, dtype=torch.uint8, device=device))
    assert advance_on_gpu([pair], logits_of([pair], 0, device), state, beams) == [True]
    if not advance_on_gpu([pair], torch.full((4, VOCABULARY), torch.nan, device=device), state, beams)[0]:
        pair.on_gpu = pair.twin.result()
    assert len(pair.on_gpu) == 4
    assert all(token < VOCABULARY for beam in pair.on_gpu for token in beam.output)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"beam_width": 17}, False),
        ({"beam_width": 1}, False),
        ({"request_output_len": 1}, False),
        ({"end_ids": (1, 2, 3, 4, 5)}, False),
        ({"stop_words_list": ((1, 2),)}, False),
        ({"bad_words_list": ((1,),)}, False),
        ({"repetition_penalty": 1.1}, False),
    ],
)
def test_what_needs_the_host_is_chosen_there(fields: dict[str, Any], expected: bool) -> None:
    assert can_choose_on_device(params(**fields), VOCABULARY) == expected
    assert not can_choose_on_device(params(**fields), 6)
