"""Who takes part in a step: order of arrival, no stalls, no lost page, no starvation. Sampling is a token appended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_triton.engine.beam import most_searches, spread
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.scheduler import Scheduled, Scheduler
from gptj_triton.engine.sequence import Request, Sequence

PAGE = 4
END = 99


def make_scheduler(num_pages: int = 64, step_tokens: int = 8, max_sequences: int = 16) -> Scheduler:
    return Scheduler(PagePool(num_pages, PAGE), step_tokens, max_sequences, EngineMetrics())


def sequence(key: int, prompt: int, new: int = 4) -> Sequence:
    own_tokens = range(1000 * key, 1000 * key + prompt)  # so that no two sequences share a page
    return Sequence(key, list(own_tokens), SamplingParams(request_output_len=new, end_ids=(END,)))


def compute(scheduler: Scheduler) -> tuple[list[Scheduled], list[Sequence]]:
    """One step as the engine does it, each sampled token being a 1; returns what was computed and what ended."""
    step = scheduler.schedule()
    sampling = [scheduled.sequence for scheduled in step if scheduled.samples]
    for scheduled in step:
        computed = scheduled.sequence
        assert len(computed.pages) == scheduler.pool.pages_for(computed.num_cached + scheduled.num_tokens)
        scheduler.pool.computed(computed, scheduled.num_tokens)
    ended = []
    for computed in sampling:
        computed.append(1, 0.0, [])
        if computed.finish_reason is not None:
            scheduler.remove([computed])
            ended.append(computed)
    scheduler.pool.check_integrity(scheduler)
    return step, ended


def shares(step: list[Scheduled]) -> dict[Any, int]:
    return {scheduled.sequence.key: scheduled.num_tokens for scheduled in step}


def test_prompts_are_computed_in_order_of_arrival() -> None:
    scheduler = make_scheduler(step_tokens=8)
    for key, prompt in enumerate((5, 6, 2, 20)):
        scheduler.add(sequence(key, prompt))
    assert shares(compute(scheduler)[0]) == {0: 5, 1: 3}
    assert shares(compute(scheduler)[0]) == {0: 1, 1: 3, 2: 2, 3: 3}
    assert shares(compute(scheduler)[0]) == {0: 1, 1: 1, 2: 1, 3: 8}


def test_a_long_prompt_never_keeps_a_decoding_sequence_out_of_a_step() -> None:
    scheduler = make_scheduler(step_tokens=8)
    decoding = [sequence(key, 2, new=20) for key in range(3)]
    for each in decoding:
        scheduler.add(each)
    compute(scheduler)
    scheduler.add(sequence(9, 100))
    for _ in range(12):
        step, _ = compute(scheduler)
        assert all(shares(step)[each.key] == 1 for each in decoding)


def test_a_step_computes_no_more_prompt_tokens_than_it_may() -> None:
    scheduler = make_scheduler(step_tokens=8, num_pages=512)
    for key in range(10):
        scheduler.add(sequence(key, 3 + 5 * key))
    while len(scheduler):
        decoding = {each.key for each in scheduler if each.decoding}
        step, _ = compute(scheduler)
        assert sum(tokens for key, tokens in shares(step).items() if key not in decoding) <= 8


def test_a_prompt_of_one_token_is_computed() -> None:
    scheduler = make_scheduler()
    scheduler.add(sequence(0, 1, new=2))
    assert shares(compute(scheduler)[0]) == {0: 1}
    assert [each.key for each in compute(scheduler)[1]] == [0]


def test_no_more_sequences_run_than_may() -> None:
    scheduler = make_scheduler(max_sequences=2)
    for key in range(5):
        scheduler.add(sequence(key, 1, new=3))
    while len(scheduler):
        step, _ = compute(scheduler)
        assert len(step) <= 2


def test_the_last_to_arrive_gives_way_and_starts_again_where_it_was() -> None:
    scheduler = make_scheduler(num_pages=4, step_tokens=16)
    first, last = sequence(0, 7, new=9), sequence(1, 7, new=9)
    scheduler.add(first)
    scheduler.add(last)
    steps = [shares(compute(scheduler)[0]) for _ in range(2)]
    assert steps == [{0: 7, 1: 7}, {0: 1, 1: 1}]
    assert shares(compute(scheduler)[0]) == {0: 1}
    assert (last.pages, last.num_cached, len(last.output)) == ([], 0, 2)
    ended = [str(each.key) for _ in range(30) for each in compute(scheduler)[1]]
    assert ended == ["0", "1"]
    assert len(last.output) == 9
    assert scheduler.metrics.num_preemptions_total == 1


def test_a_sequence_too_large_for_the_free_pages_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_pages=6, step_tokens=32)
    scheduler.add(sequence(0, 8, new=8))
    compute(scheduler)
    scheduler.add(sequence(1, 20, new=4))
    scheduler.add(sequence(2, 1, new=1))
    order = [str(each.key) for _ in range(40) for each in compute(scheduler)[1]]
    assert order.index("2") > order.index("0")
    assert sorted(order) == ["0", "1", "2"]


def test_a_prompt_that_waits_for_pages_halfway_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_pages=7, step_tokens=8)
    scheduler.add(sequence(0, 11, new=12))
    compute(scheduler)
    compute(scheduler)
    scheduler.add(sequence(1, 14, new=2))
    assert shares(compute(scheduler)[0]) == {0: 1, 1: 8}
    scheduler.add(sequence(2, 1, new=1))
    assert shares(compute(scheduler)[0]) == {0: 1}, "two pages are missing, and the one that is free is not for another"


def test_a_search_is_admitted_only_where_all_of_its_beams_may_run() -> None:
    scheduler = make_scheduler(max_sequences=4)
    search = Sequence(2, [1, 2, 3], SamplingParams(request_output_len=4, end_ids=(END,), beam_width=3))
    for waiting in (sequence(1, prompt=3, new=9), sequence(3, prompt=3, new=2), search):
        scheduler.add(waiting)
    keys = [set(shares(compute(scheduler)[0])) for _ in range(3)]
    assert keys == [{1, 3}, {1, 3}, {1, 2}]


def searching(scheduler: Scheduler) -> int:
    """One step in which a GPU chooses beams, each token being a 1; returns how many searches have pages."""
    step = scheduler.schedule()
    sampling = [scheduled.sequence for scheduled in step if scheduled.samples]
    for scheduled in step:
        scheduler.pool.computed(scheduled.sequence, scheduled.num_tokens)
    for computed in sampling:
        if computed.params.beam_width == 1 or computed.keeps_pages:
            computed.append(1, 0.0, [])
            continue
        for beam in spread(computed):
            scheduler.pool.fork(computed, beam)
            beam.append(1, 0.0, [])
        scheduler.replace([computed], computed.group)
    for computed in sampling:
        if computed.finish_reason is not None and computed is computed.group[0]:
            scheduler.remove(computed.group)
    scheduler.pool.check_integrity(scheduler)
    return len({id(each.group) for each in scheduler.running if each.keeps_pages})


def test_there_is_a_slot_for_every_search_that_has_pages() -> None:
    """Also where two give way at once, a third begins in the turn of another client, and places are odd."""
    scheduler = make_scheduler(num_pages=12, step_tokens=64, max_sequences=5)
    clients = Request(), Request()
    made = [(1, 20, 1, 0), (4, 16, 2, 1), (4, 20, 2, 1), (5, 4, 2, 0), (5, 12, 2, 0)]
    for key, (prompt, new, width, client) in enumerate(made):
        params = SamplingParams(request_output_len=new, end_ids=(END,), beam_width=width)
        scheduler.add(Sequence(key, sequence(key, prompt).prompt, params, request=clients[client]))
    most = 0
    while len(scheduler):
        most = max(most, searching(scheduler))
    assert most == most_searches(5) == 3
    assert [most_searches(places) for places in (1, 2, 3, 4, 64)] == [1, 1, 2, 2, 32]


def launch(scheduler: Scheduler) -> list[Scheduled]:
    """A step whose tokens nobody knows yet."""
    step = scheduler.schedule()
    for scheduled in step:
        samples = scheduled.samples
        scheduler.pool.computed(scheduled.sequence, scheduled.num_tokens)
        scheduled.sequence.in_flight += samples
    return step


def test_a_sequence_whose_last_token_is_in_flight_takes_part_in_no_further_step() -> None:
    scheduler = make_scheduler()
    scheduler.add(sequence(1, prompt=3, new=2))
    assert [shares(launch(scheduler)) for _ in range(3)] == [{1: 3}, {1: 1}, {}]


def test_a_sequence_that_gave_way_with_a_token_in_flight_waits_until_that_is_known() -> None:
    scheduler = make_scheduler()
    waiting = sequence(1, prompt=3)
    waiting.in_flight = 1
    scheduler.add(waiting)
    assert scheduler.schedule() == []
    waiting.in_flight = 0
    assert shares(scheduler.schedule()) == {1: 3}


def test_a_page_is_shared_only_once_all_of_its_tokens_are_known() -> None:
    scheduler = make_scheduler()
    first, other, twin = (sequence(1, prompt=3, new=8) for _ in range(3))
    scheduler.add(first)
    launch(scheduler)
    launch(scheduler)  # completes the page with a token that nobody knows
    first.output, first.in_flight = [7, 7], 0
    other.output = [8, 7]  # the same page but for its last token
    scheduler.pool.attach_prefix(other)
    assert other.pages == []
    launch(scheduler)
    twin.output = [7, 7]
    scheduler.pool.attach_prefix(twin)
    assert twin.pages == first.pages[:1]


def test_removing_a_sequence_gives_its_pages_back_wherever_it_stands() -> None:
    scheduler = make_scheduler(num_pages=8, step_tokens=4)
    running, halfway, waiting = sequence(0, 2, new=9), sequence(1, 10), sequence(2, 30, new=1)
    for each in (running, halfway, waiting):
        scheduler.add(each)
    compute(scheduler)
    compute(scheduler)
    for each in (halfway, waiting, running):
        assert scheduler.find(each.key) is each
        scheduler.remove([each])
        assert scheduler.find(each.key) is None
        scheduler.pool.check_integrity(scheduler)
    assert scheduler.pool.num_free == 8


@dataclass(frozen=True)
class Arrival:
    at: int  # the step before which it arrives
    prompt: int
    new: int
    cancelled_after: int  # steps from its arrival


ARRIVALS = st.lists(
    st.builds(Arrival, st.integers(0, 40), st.integers(1, 30), st.integers(1, 18), st.integers(0, 300)), max_size=25
)


@settings(max_examples=100)
@given(arrivals=ARRIVALS, num_pages=st.integers(12, 40), step_tokens=st.integers(1, 24), at_once=st.integers(1, 8))
def test_every_sequence_ends_exactly_once_and_every_page_comes_back(
    arrivals: list[Arrival], num_pages: int, step_tokens: int, at_once: int
) -> None:
    scheduler = make_scheduler(num_pages, step_tokens, at_once)
    expected = {key: arrival.new for key, arrival in enumerate(arrivals)}
    ended: list[Sequence] = []
    cancelled: set[int] = set()
    # One sequence is always the first and is computed without a break, so these steps are enough for all in turn.
    most = 41 + sum(arrival.prompt + 2 * arrival.new for arrival in arrivals)
    for now in range(most + 1):
        for key, arrival in enumerate(arrivals):
            if arrival.at == now:
                scheduler.add(sequence(key, arrival.prompt, arrival.new))
            found = scheduler.find(key)
            if found is not None and now == arrival.at + arrival.cancelled_after:
                scheduler.remove([found])
                cancelled.add(key)
        first = next(iter(scheduler), None)
        before = first.num_cached if first else 0
        step, just_ended = compute(scheduler)
        ended += just_ended
        assert bool(step) == (first is not None)
        assert first is None or first in just_ended or first.num_cached > before, "the first in line did not get on"
        if not len(scheduler) and now > 40:
            break
    assert not len(scheduler), "a sequence starves"
    keys = [each.key for each in ended if isinstance(each.key, int)]
    assert sorted([*keys, *cancelled]) == sorted(expected)
    assert all(len(each.output) == expected[each.key] for each in ended if isinstance(each.key, int))
    assert scheduler.pool.num_free == num_pages
