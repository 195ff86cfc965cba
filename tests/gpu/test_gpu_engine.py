"""The engine on a GPU gives what plain torch gives there, and what a request gets alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gptj_engine import engine as engine_module
from gptj_engine.config import EngineConfig
from gptj_engine.engine import Engine
from gptj_engine.runner import Runner
from gptj_engine.sampling_params import SamplingParams
from gptj_engine.sequence import Sequence

STORYTELLER = Path(__file__).resolve().parents[2] / "model_repository" / "fastertransformer" / "1" / "storyteller"
END = 4095

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of many lengths, greedy and drawn, with penalties, bans and beams."""
    chance = random.Random(1)
    made = []
    for number in range(24):
        prompt = chance.choices(range(END), k=chance.choice([1, 2, 16, 17, 60, 130, 300]))
        fields: dict[str, Any] = {"request_output_len": chance.randint(1, 60), "end_id": END}
        if number % 3 == 1:
            fields |= {"runtime_top_k": chance.choice([0, 5, 50]), "runtime_top_p": 0.9, "random_seed": number}
        if number % 6 == 2:
            fields |= {"repetition_penalty": 1.2, "bad_words": ((5,), (9, 7)) if number == 8 else ((5,),)}
        if number == 20:
            fields["beam_width"] = 3
        made.append((prompt, SamplingParams(**fields)))
    return made


def run(engine: Engine, made: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """The first result of each request, all submitted at once."""
    found: dict[Any, list[int]] = {}
    for number, (prompt, params) in enumerate(made):
        engine.submit(Sequence(number, prompt, params))
    while engine.busy:
        found |= {ended[0].key: ended[0].output for ended in engine.step()}
    engine.check_integrity()
    return [found[number] for number in range(len(made))]


@pytest.fixture(params=["fp32", "fp16"])
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return EngineConfig(
        str(STORYTELLER), data_type=request.param, device="cuda", kv_cache_gib=2.0, max_sequences=32, step_tokens=64
    )


def test_tokens_are_those_of_plain_torch_and_of_a_request_alone(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = requests()
    engine = Engine(config)
    found = run(engine, made)
    assert [run(engine, [one])[0] for one in made] == found
    monkeypatch.setattr(engine_module, "make_runner", Runner)
    expected = run(Engine(config), made)
    equal = sum(one == other for one, other in zip(found, expected, strict=True))
    # In fp16 a near-tie may go the other way; in fp32 none of these does.
    assert equal >= (24 if config.data_type == "fp32" else 20)
