"""Launching a step before the last one's tokens are known changes nothing in what a request gets.

A GPU does so; here a runner on the CPU does the same with the tokens that it keeps to itself for a step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.eager.sharded_model import ShardedModel
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.load import assemble, load_engine
from gptj_triton.engine.runner import Model
from gptj_triton.engine.sampler import sample
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sampled, Sequence
from gptj_triton.engine.step_plan import StepPlan

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


class AheadSampler:
    """Keeps the tokens of a step to itself until the next one is launched."""

    steps_ahead = 1

    def __init__(self, model: SecretiveModel) -> None:
        self._model = model
        self.launched_ahead = 0

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        return all(sequence.params.beam_width == 1 for sequence in sequences)

    def start(self, logits: Tensor, sequences: list[Sequence]) -> Callable[[], list[list[Sampled]]]:
        if not self.can_run_ahead(sequences):
            kept = logits.clone()
            return lambda: sample(kept, sequences)
        self.launched_ahead += any(sequence.in_flight for sequence in sequences)
        chosen = sample(logits.clone(), sequences)
        self._model.sampled = [choices[0].token for choices in chosen]
        for sequence in sequences:
            sequence.in_flight += 1

        def wait() -> list[list[Sampled]]:
            for sequence in sequences:
                sequence.in_flight -= 1
            return chosen

        return wait


@pytest.fixture
def engines(make_checkpoint: Callable[..., Path]) -> Iterator[tuple[Engine, Engine]]:
    """One that waits for every step and one that runs ahead, both short of pages."""
    config = EngineConfig(
        str(make_checkpoint(n_layer=2, n_positions=128)),
        device="cpu",
        kv_cache_gib=0.00035,
        step_tokens=24,
        max_sequences=8,
    )
    model_config = ModelConfig.read(config.checkpoint)
    model = SecretiveModel(ShardedModel(config, model_config))
    sampler = AheadSampler(model)
    yield load_engine(config), assemble(config, model_config, model, sampler)
    assert sampler.launched_ahead > 5, "it never ran ahead"


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
            beam_width=chance.choice([1] * 7 + [3]) if seed % 2 else 1,  # beams make the others wait
        )
        made.append((chance.randint(0, 60), prompt, params))
    return made


def run(
    engine: Engine, made: list[tuple[int, list[int], SamplingParams]], cancelled: set[int]
) -> tuple[dict[int, list[list[int]]], bool]:
    """The tokens of each request that was not cancelled, and whether one had to give way."""
    found: dict[int, list[list[int]]] = {}
    preempted, step = False, 0
    while engine.busy or step <= 60:
        for number, (at, prompt, params) in enumerate(made):
            if at == step:
                engine.submit(Sequence(number, prompt, params))
            if number in cancelled and at + 9 == step:
                engine.cancel(number)
        if engine.busy:
            before = {id(sequence): sequence.num_cached for sequence in engine.scheduler}
            for ended in engine.step():
                assert isinstance(ended[0].key, int)
                assert ended[0].key not in found, "a request ended twice"
                found[ended[0].key] = [sequence.output for sequence in ended]
            preempted |= any(sequence.num_cached < before.get(id(sequence), 0) for sequence in engine.scheduler)
            engine.check_integrity()
        step += 1
        assert step < 3000, "the engine does not come to an end"
    return {number: outputs for number, outputs in found.items() if number not in cancelled}, preempted


@pytest.mark.parametrize("seed", range(4))
def test_tokens_do_not_depend_on_whether_the_host_waits_for_them(engines: tuple[Engine, Engine], seed: int) -> None:
    made = requests(seed)
    cancelled = set(random.Random(seed).sample(range(len(made)), 5))
    expected, _ = run(engines[0], made, cancelled)
    found, preempted = run(engines[1], made, cancelled)
    assert found == expected
    assert len(found) == len(made) - len(cancelled)
    assert preempted, "nothing had to give way"
