"""Who waits, and for how long: under any flood a short request begins at once, the flood hardly loses, nobody starves.

A step is scheduled and computed as the engine does it; every sampled token is a 1.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_triton.engine import early_starts
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.scheduler import Scheduler
from gptj_triton.engine.sequence import Request, Sequence

END = 99
PAGE = 16
STEP_COST = 8  # in tokens; on a CPU, a step takes as long as if it had so many more
SOON = 2  # steps within which a request for one token must have been computed


class Steps:
    """A scheduler, and what became of its sequences: the step in which each got its first token, and its last."""

    def __init__(self, num_pages: int = 2048, step_tokens: int = 256, max_sequences: int = 64) -> None:
        self.scheduler = Scheduler(PagePool(num_pages, PAGE), step_tokens, max_sequences, EngineMetrics())
        self.first: dict[Sequence, int] = {}
        self.ended: dict[Sequence, int] = {}
        self.now = 0
        self.cost = 0

    def add(self, prompt: int, new: int, request: Request | None = None, beams: int = 1, seed: int = -1) -> Sequence:
        chance = random.Random(seed if seed >= 0 else 1000 + len(self.ended) + len(self.scheduler))
        params = SamplingParams(request_output_len=new, end_ids=(END,), beam_width=beams)
        tokens = chance.choices(range(100, 10000), k=prompt)
        request = request or Request()
        request.num_tokens += params.most_tokens(prompt)
        sequence = Sequence(object(), tokens, params, request=request)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> dict[Sequence, int]:
        """Compute a step; returns how many tokens of which sequence."""
        self.now += 1
        scheduler = self.scheduler
        step = scheduler.schedule()
        assert len(step) <= scheduler.max_sequences
        sampling = [scheduled.sequence for scheduled in step if scheduled.samples]
        for scheduled in step:
            sequence = scheduled.sequence
            assert len(sequence.pages) == scheduler.pool.pages_for(sequence.num_cached + scheduled.num_tokens)
            scheduler.pool.computed(sequence, scheduled.num_tokens)
        branching: dict[object, list[Sequence]] = {}
        for sequence in sampling:
            self.first.setdefault(sequence, self.now)
            if sequence.params.beam_width > 1:
                branching.setdefault(sequence.key, []).append(sequence)
                continue
            sequence.append(1, 0.0, [])
            if sequence.finish_reason is not None:
                scheduler.remove([sequence])
                self.ended[sequence] = self.now
        for beams in branching.values():
            self._branch(beams)
        if self.now % 20 == 0:
            scheduler.pool.check_integrity(scheduler)
        self.cost += STEP_COST + sum(scheduled.num_tokens for scheduled in step)
        return {scheduled.sequence: scheduled.num_tokens for scheduled in step}

    def _branch(self, beams: list[Sequence]) -> None:
        """Every beam goes on, the first of a new search as all of them."""
        width = beams[0].params.beam_width
        assert len(beams) in (1, width), "beams of a search decode in the same step"
        parents = beams * width if len(beams) == 1 else beams
        group = [parent.copy() for parent in parents]
        for number, (parent, beam) in enumerate(zip(parents, group, strict=True)):
            beam.append(2 + number, 0.0, [])
            beam.group = group
            self.scheduler.pool.fork(parent, beam)
        if group[0].finish_reason is None:
            self.scheduler.replace(beams[0].group, group)
            return
        for beam in group:
            self.scheduler.pool.release(beam)
        self.scheduler.remove(beams[0].group)
        self.ended[group[0]] = self.now

    def run(self, steps: int = 10**6) -> int:
        """Steps until nothing is left, at most so many."""
        began = self.now
        while len(self.scheduler) and self.now < began + steps:
            self.step()
        return self.now - began


def flood(steps: Steps, kind: str) -> None:
    one = Request()
    if kind == "long prompts":
        for _ in range(64):
            steps.add(680, 1)
    elif kind == "prompts that share a prefix":
        for number in range(64):
            shared = steps.add(600, 8, seed=number % 4)
            shared.prompt += [number] * 80
    elif kind == "all places":
        for _ in range(128):
            steps.add(8, 400)
    elif kind == "all pages":
        for _ in range(80):
            steps.add(400, 300)
    elif kind == "one request of many rows":
        for _ in range(128):
            steps.add(680, 16, one)
    elif kind == "one request of many short rows":
        for _ in range(128):
            steps.add(8, 1, one)
    elif kind == "short rows among long prompts":
        for _ in range(200):
            steps.add(600, 8)
            steps.add(4, 1, one)
    elif kind == "beams":
        for _ in range(32):
            steps.add(100, 100, beams=16)
    elif kind == "as many beams as places":
        for _ in range(4):
            steps.add(40, 60, beams=64)


FLOODS = [
    "long prompts",
    "prompts that share a prefix",
    "all places",
    "all pages",
    "one request of many rows",
    "one request of many short rows",
    "short rows among long prompts",
    "beams",
    "as many beams as places",
]


@pytest.mark.parametrize("kind", FLOODS)
@pytest.mark.parametrize("after", [0, 1, 7, 60, 150])
def test_a_request_for_one_token_begins_at_once_whatever_waits_and_runs(kind: str, after: int) -> None:
    steps = Steps()
    flood(steps, kind)
    steps.run(after)
    asked = [steps.add(prompt, 1) for prompt in (1, 30)]
    for _ in range(SOON + (kind == "as many beams as places")):
        steps.step()
    assert all(sequence in steps.ended for sequence in asked)


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_hardly_loses_by_short_requests_that_come_meanwhile(kind: str) -> None:
    """One in 15 steps, which is one a second where a step takes 67 ms."""
    steps = {short: Steps() for short in (False, True)}
    for short, each in steps.items():
        flood(each, kind)
        keys = [sequence.key for sequence in each.scheduler]
        while any(each.scheduler.find(key) for key in keys):
            if short and each.now % 15 == 5:
                each.add(12, 1)
            each.step()
    assert steps[True].cost <= 1.05 * steps[False].cost


def test_requests_take_turns_however_many_rows_each_has() -> None:
    steps = Steps(step_tokens=40)
    rows = Request()
    many = [steps.add(680, 2, rows) for _ in range(16)]
    single = [steps.add(680, 2) for _ in range(3)]
    steps.run()
    in_order = sorted([*many, *single], key=lambda each: steps.ended[each])
    assert [each in single for each in in_order[:5]] == [False, True, True, True, False]


def test_a_row_of_a_large_request_is_not_short() -> None:
    steps = Steps(step_tokens=32)
    rows = Request()
    for _ in range(100):
        steps.add(10, 1, rows)
    for _ in range(10):
        steps.add(600, 4)
    asked = steps.add(40, 1)
    steps.run(4)
    assert asked in steps.ended


def test_a_request_has_as_many_tokens_as_its_client_said_before_and_after_its_rows_came() -> None:
    params = SamplingParams(request_output_len=10, end_ids=(END,))
    request = Request(24)
    for _ in range(2):
        Sequence(object(), [1, 2], params, request=request)
        assert request.num_tokens == 24
    assert Sequence(object(), [1, 2], params).request.num_tokens == 12


@pytest.mark.parametrize("beams", [1, 2])
def test_running_sequences_sit_out_in_turn(beams: int) -> None:
    steps = Steps(max_sequences=8)
    running = [steps.add(4, 200, beams=beams) for _ in range(8 // beams)]
    steps.run(2)
    computed: Counter[object] = Counter()
    for number in range(80):
        if number % 2:
            steps.add(4, 1)
        computed.update({sequence.key for sequence in steps.step()})
    counts = [computed[each.key] for each in running]
    assert max(counts) - min(counts) <= 2
    assert min(counts) >= 80 - 40 // len(running) - 2


def test_a_sequence_that_began_early_goes_on_when_its_turn_comes() -> None:
    steps = Steps(step_tokens=64)
    for _ in range(6):
        steps.add(600, 2)
    early = steps.add(20, 200)
    steps.run(2)
    assert early in steps.scheduler.early.sequences
    assert early in steps.scheduler.line
    steps.run(80)
    assert early in steps.scheduler.running
    assert not len(steps.scheduler.line)
    assert len(early.output) > 30


def test_the_first_of_all_may_have_the_whole_cache() -> None:
    steps = Steps(num_pages=128, max_sequences=8)
    whole = steps.add(1500, 548)
    for _ in range(600):
        if steps.now % 5 == 0:
            steps.add(10, 4)
        steps.step()
    assert whole in steps.ended


def test_what_waits_costs_a_step_nothing() -> None:
    """In calls, which do not depend on the machine."""

    def calls(waiting: int) -> int:
        steps = Steps()
        for _ in range(waiting):
            steps.add(40, 1)
        steps.run(20)
        count = 0

        def note(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(note)
        try:
            for _ in range(5):
                steps.step()
        finally:
            sys.setprofile(None)
        return count

    assert calls(8000) < 1.1 * calls(400)


@dataclass(frozen=True)
class Arrival:
    at: int  # the step before which it arrives
    rows: int
    prompt: int
    new: int
    beams: int
    cancelled_after: int  # steps from its arrival


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 40),
        st.sampled_from([1, 1, 1, 5]),
        st.sampled_from([1, 2, 15, 16, 17, 40, 100]),
        st.sampled_from([1, 1, 2, 16, 30]),
        st.sampled_from([1, 1, 1, 2, 4]),
        st.sampled_from([0, 3, 20, 1000]),
    ),
    max_size=16,
)


@settings(max_examples=150)
@given(
    arrivals=ARRIVALS,
    num_pages=st.integers(20, 60),
    kept=st.sampled_from([4, 8, 64]),
    step_tokens=st.integers(1, 40),
    at_once=st.integers(4, 12),
)
def test_every_sequence_ends_and_the_first_of_all_always_gets_on(
    arrivals: list[Arrival], num_pages: int, kept: int, step_tokens: int, at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_starts, "PAGES", kept)
        steps = Steps(num_pages, step_tokens, at_once)
        scheduler = steps.scheduler
        asked: dict[object, tuple[int, Arrival]] = {}
        # The first of all gets on in one of two steps, so these are enough for all in turn.
        most = 41 + 2 * sum(each.rows * (each.prompt + 2 * each.new * each.beams + 4) for each in arrivals)
        standing: tuple[object, int, int] | None = None
        while steps.now <= most and (steps.now <= 40 or len(scheduler)):
            for arrival in arrivals:
                if arrival.at == steps.now:
                    request = Request()
                    for _ in range(arrival.rows):
                        sequence = steps.add(arrival.prompt, arrival.new, request, arrival.beams)
                        asked[sequence.key] = steps.now, arrival
            for key, (at, arrival) in list(asked.items()):
                found = scheduler.find(key)
                if found is not None and steps.now == at + arrival.cancelled_after:
                    scheduler.remove(list(found.group))
                    del asked[key]
            first = next(iter(scheduler), None)
            if first is not None:
                done = sum(each.num_cached for each in first.group), len(first.output)
                standing = (
                    (first.key, steps.now, hash(done))
                    if (standing is None or standing[0] != first.key or standing[2] != hash(done))
                    else standing
                )
                assert steps.now - standing[1] <= 4, "the first of all does not get on"
            steps.step()
        assert not len(scheduler), "a sequence starves"
        assert {sequence.key for sequence in steps.ended} == set(asked)
        scheduler.pool.check_integrity(scheduler)
        assert scheduler.pool.num_free == num_pages
        assert not scheduler.early.sequences
