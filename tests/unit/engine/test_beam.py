"""Beam search against an exhaustive reference and against `transformers`, and its beams' hold on the KV cache."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTJForCausalLM

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.beam import BeamSearch
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.kv_cache import KVCache
from gptj_triton.engine.load import load_engine
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Sampled, Sequence

VOCABULARY = 6
END = 5
Scored = tuple[float, tuple[int, ...]]


@pytest.fixture(scope="module")
def tiny(make_checkpoint: Callable[..., Path]) -> Path:
    """A GPT-J of six tokens, whose continuations can all be tried."""
    return make_checkpoint(vocab_size=VOCABULARY, bos_token_id=END, eos_token_id=END)


@pytest.fixture(scope="module")
def tiny_reference(tiny: Path) -> Any:
    return GPTJForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny_engine(tiny: Path) -> Engine:
    return load_engine(EngineConfig(str(tiny), device="cpu", kv_cache_gib=0.05))


@pytest.fixture(scope="module")
def crowded(tiny: Path) -> Engine:
    """An engine with pages for one full context and hardly more."""
    return load_engine(EngineConfig(str(tiny), device="cpu", kv_cache_gib=0.0015, step_tokens=32, max_sequences=8))


def search(engine: Engine, prompt: list[int], key: Any = "beams", **fields: Any) -> list[Sequence]:
    """The result of one search on an idle engine."""
    engine.submit(Sequence(key, prompt, SamplingParams(**dict[str, Any](end_ids=(END,)) | fields)))
    ended: list[list[Sequence]] = []
    while engine.busy:
        ended += engine.step()
        engine.check_integrity()
    assert len(ended) == 1
    return ended[0]


def every_continuation(model: Any, prompt: list[int], most: int, len_penalty: float) -> list[Scored]:
    """(score, tokens) of all continuations that end with END or are `most` tokens long, best first."""
    results: list[Scored] = []
    unfinished: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(most):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + list(tokens) for tokens, _ in unfinished])).logits[:, -1]
        log_probs = torch.log_softmax(logits.float(), dim=-1).tolist()
        longer = [
            (tokens + (token,), total + row[token])
            for (tokens, total), row in zip(unfinished, log_probs, strict=True)
            for token in range(VOCABULARY)
        ]
        results += [(_score(total, tokens, len_penalty), tokens) for tokens, total in longer if tokens[-1] == END]
        unfinished = [(tokens, total) for tokens, total in longer if tokens[-1] != END]
    results += [(_score(total, tokens, len_penalty), tokens) for tokens, total in unfinished]
    return sorted(results, reverse=True)


def _score(total: float, tokens: tuple[int, ...], len_penalty: float) -> float:
    return total / math.pow(len(tokens), len_penalty)


@pytest.mark.parametrize("len_penalty", [0.0, 1.0, -1.0, 0.5])
def test_a_search_wide_enough_finds_the_best_of_all_continuations(
    tiny_engine: Engine, tiny_reference: Any, len_penalty: float
) -> None:
    for prompt in ([1], [0, 4, 2], [3, 3, 3, 1, 0]):
        best = every_continuation(tiny_reference, prompt, 3, len_penalty)
        found = search(tiny_engine, prompt, request_output_len=3, beam_width=64, len_penalty=len_penalty)
        for (score, tokens), beam in zip(best[:20], found, strict=False):
            assert tuple(beam.output) == tokens
            assert _score(beam.cum_log_prob, tokens, len_penalty) == pytest.approx(score, abs=1e-4)
            assert beam.finish_reason == ("stop" if tokens[-1] == END else "length")


def beams_of_transformers(
    reference: Any, prompt: list[int], new_tokens: int, width: int, pad_id: int, **more: Any
) -> list[list[int]]:
    """The new tokens of each beam, best first, filled up with `pad_id` to one length."""
    settings = {"length_penalty": 0.0, "early_stopping": "never", "do_sample": False, "pad_token_id": pad_id} | more
    found = reference.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, num_beams=width, num_return_sequences=width, **settings
    )
    beams: list[list[int]] = found[:, len(prompt) :].tolist()
    return beams


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("len_penalty", [0.0, 1.0, 2.0])
def test_beams_are_those_of_transformers(
    tiny_engine: Engine, tiny_reference: Any, width: int, len_penalty: float
) -> None:
    # Small vocabularies end often, so finished hypotheses and those that go on compete all the time.
    for prompt in ([1], [0, 4, 2], [3, 3, 3, 1, 0], [2, 0, 0, 1, 4, 4, 1, 2, 3, 0, 1, 1, 2, 3, 4, 0, 1]):
        texts = beams_of_transformers(tiny_reference, prompt, 12, width, END, length_penalty=len_penalty)
        found = search(tiny_engine, prompt, request_output_len=12, beam_width=width, len_penalty=len_penalty)
        assert [beam.output + [END] * (len(texts[0]) - len(beam.output)) for beam in found] == texts


def test_beams_of_the_embedded_model_are_those_of_transformers(engine: Engine, reference: Any) -> None:
    prompt = random.Random(3).choices(range(4000), k=21)
    expected = beams_of_transformers(reference, prompt, 30, 4, 4095)
    found = search(engine, prompt, end_ids=(4095,), request_output_len=30, beam_width=4)
    assert [beam.output for beam in found] == expected


def test_beams_that_several_end_ids_end_leave_as_many_that_go_on(engine: Engine, reference: Any) -> None:
    prompt = [2167, 716, 258, 515]
    free = search(engine, prompt, end_ids=(4095,), request_output_len=12, beam_width=4)
    end_ids = [4095, *dict.fromkeys(beam.output[place] for place in (2, 3, 5) for beam in free)]
    expected = beams_of_transformers(reference, prompt, 12, 4, 4095, eos_token_id=end_ids)
    found = search(engine, prompt, end_ids=tuple(end_ids), request_output_len=12, beam_width=4)
    for beam, row in zip(found, expected, strict=True):
        assert beam.output == row[: len(beam.output)]
        assert set(row[len(beam.output) :]) <= {4095}


def test_a_search_among_others_finds_what_it_finds_alone(engine: Engine, storyteller: Path) -> None:
    """Also when the KV cache is so small that beams are preempted, and their prompts are equal."""
    prompts = [random.Random(number % 6).choices(range(4000), k=20) for number in range(12)]
    fields: dict[str, Any] = {"end_ids": (4095,), "request_output_len": 70, "min_length": 70}
    alone = [search(engine, prompt, beam_width=3, **fields) for prompt in prompts[:6]]
    small = load_engine(EngineConfig(str(storyteller), device="cpu", kv_cache_gib=0.0123, step_tokens=24))
    for number, prompt in enumerate(prompts):
        small.submit(Sequence(number, prompt, SamplingParams(beam_width=3, **fields)))
    ended: dict[Any, list[list[int]]] = {}
    preempted = False
    while small.busy:
        running = set(small.scheduler.running)
        for result in small.step():
            ended[result[0].key] = [beam.output for beam in result]
        preempted = preempted or any(sequence in small.scheduler.line for sequence in running)
        small.check_integrity()
    assert [ended[number] for number in range(12)] == 2 * [[beam.output for beam in result] for result in alone]
    assert preempted, "the cache was large enough, so nothing was tried"


def invented_choices(tokens: list[int], seed: int, count: int) -> list[Sampled]:
    """The best next tokens of a model that is a hash of all tokens so far."""
    chance = random.Random(repr((seed, tokens)))
    weights = [chance.random() ** 4 for _ in range(VOCABULARY)]
    choices = [Sampled(token, math.log(weight / sum(weights))) for token, weight in enumerate(weights)]
    return sorted(choices, key=lambda sampled: -sampled.log_prob)[:count]


def search_to_the_end(seed: int, width: int, most: int, len_penalty: float) -> list[tuple[int, ...]]:
    """Beam search as the definition has it, which never stops before `most` tokens."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[Scored] = []
    for _ in range(most):
        offers = [
            (tokens + (choice.token,), total + choice.log_prob)
            for tokens, total in beams
            for choice in invented_choices(list(tokens), seed, 2 * width)
        ]
        offers = sorted(offers, key=lambda offer: -offer[1])[: 2 * width]
        ended = [offer for offer in offers[:width] if offer[0][-1] == END]
        beams = [offer for offer in offers if offer[0][-1] != END][:width]
        finished += [(_score(total, tokens, len_penalty), tokens) for tokens, total in ended]
    finished += [(_score(total, tokens, len_penalty), tokens) for tokens, total in beams]
    return [tokens for _, tokens in sorted(finished, reverse=True)[:width]]


@pytest.mark.parametrize(("len_penalty", "least_early"), [(0.0, 20), (0.7, 20), (-1.0, 20), (2.0, 0)])
def test_a_search_that_stops_early_misses_nothing(len_penalty: float, least_early: int) -> None:
    stopped_early = 0
    for seed in range(200):
        width, most = 2 + seed % 3, 9
        how = SamplingParams(request_output_len=most, end_ids=(END,), beam_width=width, len_penalty=len_penalty)
        search = BeamSearch(how)
        beams = [Sequence("beams", [], how)]
        while beams:
            offered = [(beam, invented_choices(beam.output, seed, 2 * width)) for beam in beams]
            length = len(beams[0].output) + 1
            beams = [branch.beam for branch in search.advance(offered, [])]
        stopped_early += length < most
        found = [tuple(beam.output) for beam in search.result()]
        assert found == search_to_the_end(seed, width, most, len_penalty), seed
    assert stopped_early >= least_early, "too few searches stopped early to show anything"


def test_beams_share_the_pages_of_their_prompt(engine: Engine) -> None:
    prompt = random.Random(9).choices(range(4000), k=160)
    pool = engine.scheduler.pool
    free = pool.num_free
    engine.submit(Sequence("beams", prompt, SamplingParams(request_output_len=20, end_ids=(4095,), beam_width=8)))
    used = 0
    while engine.busy:
        engine.step()
        used = max(used, free - pool.num_free)
    assert used <= 160 // 16 + 8 * 2, "ten pages of the prompt, and two of each beam"


def test_the_diversity_rate_changes_the_choice_and_not_the_log_probabilities(
    tiny_engine: Engine, tiny_reference: Any
) -> None:
    prompt = [2, 0, 1]
    plain = search(tiny_engine, prompt, request_output_len=4, beam_width=3)
    diverse = search(tiny_engine, prompt, request_output_len=4, beam_width=3, beam_search_diversity_rate=-5.0)
    assert [beam.output for beam in plain] != [beam.output for beam in diverse]
    totals = {tokens: score for score, tokens in every_continuation(tiny_reference, prompt, 4, 0.0)}
    for beam in diverse:
        assert beam.cum_log_prob == pytest.approx(totals[tuple(beam.output)], abs=1e-4)


def test_a_stop_word_ends_a_beam_and_the_others_go_on(tiny_engine: Engine) -> None:
    free = search(tiny_engine, [1, 2], request_output_len=6, beam_width=4, end_ids=(END,))
    word = tuple(free[0].output[1:3])
    stopped = search(tiny_engine, [1, 2], request_output_len=6, beam_width=4, end_ids=(END,), stop_words_list=(word,))
    for beam in stopped:
        places = [i for i in range(len(beam.output) - 1) if tuple(beam.output[i : i + 2]) == word]
        assert places in ([], [len(beam.output) - 2])
    assert any(beam.output[-2:] == list(word) and beam.finish_reason == "stop" for beam in stopped)


def test_a_search_that_is_cancelled_before_it_begins_answers_with_all_its_beams(engine: Engine) -> None:
    engine.submit(Sequence("beams", [1, 2], SamplingParams(request_output_len=5, end_ids=(), beam_width=3)))
    assert [beam.output for beam in engine.cancel("beams")] == [[], [], []]
    assert not engine.busy


def test_a_cancelled_search_answers_with_what_there_is_and_frees_its_pages(engine: Engine) -> None:
    free = engine.scheduler.pool.num_free
    engine.submit(Sequence("beams", [1, 2, 3], SamplingParams(request_output_len=50, end_ids=(4095,), beam_width=4)))
    for _ in range(5):
        engine.step()
    beams = engine.cancel("beams")
    assert [len(beam.output) for beam in beams] == [5, 5, 5, 5]
    assert {beam.finish_reason for beam in beams} == {"cancelled"}
    assert not engine.busy and engine.scheduler.pool.num_free == free
    engine.check_integrity()


def test_equal_prompts_are_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random.Random(50).choices(range(4000), k=100)
    pool, schedule = engine.scheduler.pool, engine.scheduler.schedule
    computed: list[int] = []

    def counted() -> list[Scheduled]:
        step = schedule()
        computed.append(sum(scheduled.num_tokens for scheduled in step))
        return step

    monkeypatch.setattr(engine.scheduler, "schedule", counted)
    free = pool.num_free
    for number in range(8):
        how = SamplingParams(request_output_len=4, end_ids=(4095,), runtime_top_p=0.9, random_seed=number)
        engine.submit(Sequence(number, prompt, how))
    while engine.busy:
        engine.step()
        assert free - pool.num_free <= 6 + 8, "six full pages are shared, and each sequence has one of its own"
    engine.check_integrity()
    assert sum(computed) == 100 + 7 * 4 + 8 * 3, "the prompt, what no full page holds of it, and the new tokens"


def test_a_page_is_shared_only_behind_the_same_prefix(engine: Engine) -> None:
    how = SamplingParams(request_output_len=2, end_ids=(4095,))
    pages = {letter: [token] * 16 for token, letter in enumerate("abcd", start=70)}
    for key, missing in (("ab", 33), ("cd", 33), ("cb", 17), ("ab", 1)):
        engine.submit(Sequence(key, [token for letter in key for token in pages[letter]] + [9], how))
        [scheduled] = engine.scheduler.schedule()
        assert scheduled.num_tokens == missing, key
        engine.scheduler.pool.computed(scheduled.sequence, missing)
        engine.cancel(key)
    engine.check_integrity()


def test_a_prefix_that_nobody_uses_any_more_is_still_shared_until_its_pages_are_needed(engine: Engine) -> None:
    prompt = random.Random(60).choices(range(4000), k=64)
    how = SamplingParams(request_output_len=2, end_ids=(4095,))
    first = Sequence("first", prompt + [7], how)
    second = Sequence("second", prompt + [8], how)
    engine.submit(first)
    while engine.busy:
        engine.step()
    engine.submit(second)
    [scheduled] = engine.scheduler.schedule()
    assert (scheduled.sequence.num_cached, scheduled.num_tokens) == (64, 1)
    engine.cancel("second")
    engine.check_integrity()


def test_a_page_that_is_the_target_of_two_copies_holds_the_last(tiny: Path) -> None:
    cache = KVCache(ModelConfig.read(tiny), 4, torch.float32, torch.device("cpu"))
    cache.keys[:, 0], cache.keys[:, 1] = 1.0, 2.0
    cache.copy_pages([(0, 3), (1, 2), (1, 3)])
    assert [cache.keys[:, page].unique().tolist() for page in range(4)] == [[1.0], [2.0], [2.0], [2.0]]


@dataclass(frozen=True)
class Arrival:
    """A request of `width` beams (1 is an ordinary one), and the step at which it is cancelled, if it runs so long."""

    at: int
    prompt: int
    new: int
    width: int
    cancelled_at: int | None


arrivals = st.builds(
    Arrival,
    at=st.integers(0, 20),
    prompt=st.integers(1, 200),
    new=st.integers(1, 40),
    width=st.sampled_from([1, 1, 2, 4]),
    cancelled_at=st.none() | st.integers(0, 60),
)


@settings(max_examples=25)
@given(st.lists(arrivals, min_size=1, max_size=12))
def test_any_mix_of_searches_and_cancellations_ends_each_request_once_and_loses_no_page(
    crowded: Engine, requests: list[Arrival]
) -> None:
    ended: list[Any] = []
    step = 0
    while step <= 20 or crowded.busy:
        for key, request in enumerate(requests):
            if request.at == step:
                how = SamplingParams(request_output_len=request.new, end_ids=(END,), beam_width=request.width)
                crowded.submit(Sequence(key, [key % END] * request.prompt, how))
            if request.cancelled_at == step and (cancelled := crowded.cancel(key)):
                assert len(cancelled) in (1, request.width)
                ended.append(key)
        ended += [result[0].key for result in crowded.step()]
        crowded.check_integrity()
        step += 1
        assert step < 2000, "starvation"
    assert sorted(ended) == list(range(len(requests)))
    assert crowded.scheduler.pool.num_free == crowded.scheduler.pool.num_pages


def test_more_beams_than_sequences_may_run_are_not_taken(crowded: Engine) -> None:
    with pytest.raises(AssertionError):
        search(crowded, [1, 2], beam_width=9, request_output_len=2)
    crowded.check_integrity()
