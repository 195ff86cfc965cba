"""Launching a step before the last one's tokens are known changes nothing in what a request gets.

A GPU does so; here a runner on the CPU does the same with the tokens that it keeps to itself for a step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine import early_starts
from gptj_triton.engine.beam import BeamSearch, BeamStep, spread
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.eager.sharded_model import ShardedModel
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.kv_cache import PAGE_SIZE
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.load import assemble, load_engine
from gptj_triton.engine.runner import Choice, Model, Started
from gptj_triton.engine.sampler import sample
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Request, Sampled, Sequence
from gptj_triton.engine.step_plan import StepPlan, plan_step

END = 256


class SecretiveModel:
    """A model that knows the tokens which the host does not know yet."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.sampled: list[int] = []

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def page_bytes(self) -> int:
        return self._model.page_bytes

    def allocate(self, num_pages: int) -> None:
        self._model.allocate(num_pages)

    def forward(self, plan: StepPlan) -> Tensor:
        plan.token_ids = [self.sampled[-1 - token] if token < 0 else token for token in plan.token_ids]
        return self._model.forward(plan)

    def measure(self, plan: StepPlan, use: Callable[[Tensor], object]) -> int:
        return self._model.measure(plan, use)

    def close(self) -> None:
        self._model.close()


class Search:
    """A search whose beams only the sampler knows until a step later."""

    def __init__(self, prompt: Sequence) -> None:
        self.search = BeamSearch(prompt.params)
        self.beams = [Sequence("known", prompt.prompt, prompt.params)]

    def advance(self, candidates: list[list[Sampled]]) -> BeamStep:
        before = self.beams[:]
        known = {id(each) for each in self.search.finished}
        branches = self.search.advance(list(zip(before, candidates, strict=True)), [])
        self.beams = [branch.beam for branch in branches]
        going_on = [(before.index(branch.parent), _last(branch.beam)) for branch in branches]
        new = [each for each in self.search.finished if id(each) not in known]
        parents = [next(i for i, one in enumerate(before) if one.output == each.output[:-1]) for each in new]
        return BeamStep(going_on, [(parent, _last(each)) for parent, each in zip(parents, new, strict=True)])


def _last(sequence: Sequence) -> Sampled:
    return Sampled(sequence.output[-1], sequence.log_probs[-1])


class AheadSampler:
    """Keeps the tokens of a step to itself until the next one is launched, and so it does with beams. Where the host
    knows no token yet, the model cannot know it either: `oracle` computes such a beam from its first token on.
    """

    steps_ahead = 1

    def __init__(self, model: SecretiveModel, oracle: Model) -> None:
        self._model = model
        self._oracle = oracle
        self._pool = PagePool(64, PAGE_SIZE)
        self.searches: dict[Sequence, Search] = {}
        self.launched_ahead = 0
        self.searches_ahead = 0

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        return all(_is_here(sequence) for sequence in sequences)

    def prepare(self, sequences: Iterable[Sequence]) -> None:
        """Nothing: it knows a search as long as it lives."""

    def start(self, logits: Tensor, sequences: list[Sequence]) -> Started:
        self.launched_ahead += any(sequence.in_flight for sequence in sequences)
        host = [sequence for sequence in sequences if not _is_here(sequence)]
        kept = logits[[row for row, sequence in enumerate(sequences) if not _is_here(sequence)]].clone()
        places, spread_here, tokens = sequences[:], [], [0] * len(sequences)
        chosen: list[tuple[Sequence, Choice]] = []
        for row, sequence in enumerate(sequences):
            if not _is_here(sequence) or sequence is not sequence.group[0]:
                continue
            if sequence.params.beam_width == 1:
                [[sampled]] = sample(logits[[row]].clone(), [sequence])
                tokens[row] = sampled.token
                chosen.append((sequence, [sampled]))
                continue
            if not sequence.keeps_pages:
                step = self._begin(logits[[row]].clone(), sequence)
                spread_here.append(sequence)
                first, *others = sequence.group
                places[row] = first
                places += others
                tokens += [0] * len(others)
            else:
                self.searches_ahead += sequence.in_flight > 0
                search = self.searches[sequence]
                step = search.advance(self._best(search.beams))
            for beam, (_, sampled) in zip(sequence.group, step.going_on, strict=False):
                tokens[places.index(beam)] = sampled.token
            chosen.append((sequence, step))
        self._model.sampled = tokens
        under_way = [sequence for sequence in places if _is_here(sequence)]
        for sequence in under_way:
            sequence.in_flight += 1

        def wait() -> list[tuple[Sequence, Choice]]:
            for sequence in under_way:
                sequence.in_flight -= 1
            return [*chosen, *zip(host, sample(kept, host) if host else [], strict=True)]

        return Started(wait, places, spread_here)

    def _begin(self, logits: Tensor, prompt: Sequence) -> BeamStep:
        search = Search(prompt)
        step = search.advance(sample(logits, search.beams))
        self.searches[spread(prompt)[0]] = search
        return step

    def _best(self, beams: list[Sequence]) -> list[list[Sampled]]:
        if not beams:
            return []
        whole = [Sequence(None, beam.tokens(0, beam.num_tokens), beam.params) for beam in beams]
        assert all(self._pool.grow(each, each.num_tokens) for each in whole)
        plan, order = plan_step([Scheduled(each, each.num_tokens) for each in whole], self._pool)
        logits = self._oracle.forward(plan)[[order.index(each) for each in whole]]
        for each in whole:
            self._pool.release(each)
        return sample(logits, beams)


def _is_here(sequence: Sequence) -> bool:
    """Whether the sampler chooses its tokens itself."""
    params = sequence.params
    return params.beam_width == 1 or (params.request_output_len > 1 and not params.stop_words_list)


SHORT_OF: dict[str, dict[str, Any]] = {
    "pages": {"kv_cache_gib": 0.00035, "max_sequences": 8},
    "places": {"kv_cache_gib": 0.01, "max_sequences": 3},
}


@pytest.fixture
def engines(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, short_of: str
) -> Iterator[tuple[Engine, Engine]]:
    """One that waits for every step and one that runs ahead. Many pages are kept for short requests."""
    monkeypatch.setattr(early_starts, "PAGES", 3)
    checkpoint = make_checkpoint(n_layer=2, n_positions=128)
    config = EngineConfig(str(checkpoint), device="cpu", step_tokens=24, **SHORT_OF[short_of])
    model_config = ModelConfig.read(config.checkpoint)
    model = SecretiveModel(ShardedModel(config, model_config))
    oracle = ShardedModel(config, model_config)
    oracle.allocate(64)
    sampler = AheadSampler(model, oracle)
    yield load_engine(config), assemble(config, model_config, model, sampler)
    assert sampler.launched_ahead > 5, "it never ran ahead"
    assert not sampler.searches or sampler.searches_ahead > 5, "no search ran ahead"


def requests(seed: int) -> list[tuple[int, list[int], SamplingParams]]:
    """Steps of arrival, prompts and parameters of all kinds."""
    chance = random.Random(seed)
    shared = chance.choices(range(END), k=40)
    made = []
    for _ in range(24):
        prompt = shared[: chance.choice([0, 16, 33, 40])] + chance.choices(range(END), k=chance.randint(1, 20))
        params = SamplingParams(
            request_output_len=chance.randint(1, 50),
            end_ids=(chance.choice([END, chance.randrange(END)]),),
            runtime_top_k=chance.choice([0, 0, 3, 50]),
            runtime_top_p=chance.choice([0.0, 0.9]),
            random_seed=chance.getrandbits(64),
            beam_width=chance.choice([1] * 4 + [3]) if seed % 2 else 1,
            stop_words_list=((1, 2),) if seed % 2 and chance.random() < 0.1 else (),  # of beams, the host's alone
        )
        made.append((chance.randint(0, 60), prompt, params))
    return made


def run(
    engine: Engine, made: list[tuple[int, list[int], SamplingParams]], cancelled: set[int]
) -> tuple[dict[int, list[list[int]]], set[str]]:
    """The tokens of each request that was not cancelled, and what became of some on their way."""
    found: dict[int, list[list[int]]] = {}
    events, step = set(), 0
    clients = [Request() for _ in made]
    scheduler = engine.scheduler
    while engine.busy or step <= 60:
        for number, (at, prompt, params) in enumerate(made):
            if at == step:
                engine.submit(Sequence(number, prompt, params, request=clients[number % 16]))
            if number in cancelled and at + 9 == step:
                engine.cancel(number)
        if engine.busy:
            before = {sequence: (sequence.num_cached, sequence.decoding) for sequence in scheduler}
            for ended in engine.step():
                assert isinstance(ended[0].key, int)
                assert ended[0].key not in found, "a request ended twice"
                found[ended[0].key] = [sequence.output for sequence in ended]
            if scheduler.early.sequences:
                events.add("began early")
            if any(sequence.num_cached < before.get(sequence, (0, False))[0] for sequence in scheduler):
                events.add("gave way")
            if any(before.get(each) == (each.num_cached, True) and not each.complete for each in scheduler.running):
                events.add("sat out")
            engine.check_integrity()
        step += 1
        assert step < 3000, "the engine does not come to an end"
    return {number: outputs for number, outputs in found.items() if number not in cancelled}, events


@pytest.mark.parametrize(("short_of", "event"), [("pages", "gave way"), ("places", "sat out")])
@pytest.mark.parametrize("seed", [0, 2, 9, 15])
def test_tokens_depend_neither_on_whether_the_host_waits_for_them_nor_on_who_else_is_there(
    engines: tuple[Engine, Engine], seed: int, event: str
) -> None:
    made = requests(seed)
    cancelled = set(random.Random(seed).sample(range(len(made)), 5))
    expected, _ = run(engines[0], made, cancelled)
    found, events = run(engines[1], made, cancelled)
    assert found == expected
    assert len(found) == len(made) - len(cancelled)
    firsts = [engine.metrics.take().time_to_first_token_seconds.seen for engine in engines]
    assert all(len(found) <= count <= len(made) for count in firsts), "a request has one first token"
    assert {event, "began early"} <= events
    assert found == {number: run(engines[0], [(0, *made[number][1:])], set())[0][0] for number in found}
