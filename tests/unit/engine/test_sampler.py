"""The sampler draws from the distribution that its parameters say, and from nothing but its row, seed and position."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper

from gptj_triton.engine.sampler import sample, uniform
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence

VOCAB = 12
DRAWS = 4000
END = VOCAB - 1
LOGITS = torch.tensor([2.0, 1.7, 1.1, 0.8, 0.5, 0.2, -0.1, -0.4, -0.9, -1.3, -2.0, -2.2])
PROMPT = [0, 1, 1, 6, 6, 6, 8]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**dict[str, Any](request_output_len=DRAWS, end_ids=(END,)) | fields)


def draw(how: list[SamplingParams], prompts: list[list[int]], logits: Tensor = LOGITS) -> list[int]:
    """One token for each row, all rows with the same logits."""
    sequences = [Sequence(row, prompt, params) for row, (prompt, params) in enumerate(zip(prompts, how, strict=True))]
    return [sampled.token for [sampled] in sample(logits.repeat(len(how), 1), sequences)]


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    masses = [math.exp(logit - largest) for logit in logits]
    return [mass / sum(masses) for mass in masses]


def expected_probs(
    temperature: float = 1.0,
    runtime_top_k: int = 0,
    runtime_top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> list[float]:
    """The distribution by the definitions, in plain arithmetic: FasterTransformer's order of the steps."""
    logits = [logit / (temperature + 1e-6) for logit in LOGITS.tolist()]
    for token in set(PROMPT):
        logit = logits[token]
        logit = logit * repetition_penalty if logit < 0 else logit / repetition_penalty
        logits[token] = logit - presence_penalty - frequency_penalty * PROMPT.count(token)
    probs = softmax(logits)
    ranked = sorted(range(VOCAB), key=lambda token: -probs[token])
    if runtime_top_k:
        ranked = ranked[:runtime_top_k]
    kept, mass, most = [], 0.0, (runtime_top_p or 1.0) * sum(probs[token] for token in ranked)
    for token in ranked:
        if mass >= most:
            break
        kept.append(token)
        mass += probs[token]
    kept = [token for token in kept if probs[token] >= min_p * max(probs)]
    mass = sum(probs[token] for token in kept)
    return [probs[token] / mass if token in kept else 0.0 for token in range(VOCAB)]


@pytest.mark.parametrize(
    "how",
    [
        {"runtime_top_p": 1.0},
        {"runtime_top_p": 1.0, "temperature": 0.5},
        {"runtime_top_p": 1.0, "temperature": 3.0},
        {"runtime_top_k": 1},
        {"runtime_top_k": 4},
        {"runtime_top_k": 4, "temperature": 2.0},
        {"runtime_top_k": 1024},
        {"runtime_top_p": 0.6},
        {"runtime_top_p": 0.05},
        {"runtime_top_k": 6, "runtime_top_p": 0.7},
        {"runtime_top_k": 3, "runtime_top_p": 0.99},
        {"min_p": 0.2},
        {"min_p": 0.02},
        {"min_p": 1.0},
        {"min_p": 0.3, "temperature": 0.5},
        {"min_p": 0.3, "temperature": 3.0},
        {"min_p": 0.1, "runtime_top_p": 0.8},
        {"min_p": 0.4, "runtime_top_k": 9},
        {"min_p": 0.15, "runtime_top_k": 4, "runtime_top_p": 0.9},
        {"min_p": 0.2, "repetition_penalty": 1.8, "presence_penalty": 0.3},
        {"runtime_top_p": 1.0, "repetition_penalty": 1.8},
        {"runtime_top_p": 1.0, "repetition_penalty": 0.6},
        {"runtime_top_p": 1.0, "presence_penalty": 1.2},
        {"runtime_top_p": 1.0, "frequency_penalty": 0.5},
        {"runtime_top_p": 1.0, "frequency_penalty": -0.4},
        {
            "runtime_top_k": 7,
            "runtime_top_p": 0.8,
            "temperature": 1.5,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
        },
    ],
    ids=str,
)
def test_draws_follow_the_distribution_that_the_parameters_define(how: dict[str, Any]) -> None:
    tokens = draw([params(random_seed=seed, **how) for seed in range(DRAWS)], [PROMPT] * DRAWS)
    probs = expected_probs(**how)
    chi_square, freedom = 0.0, -1
    for token, prob in enumerate(probs):
        if prob == 0.0:
            assert token not in tokens, f"token {token} is outside of what may be drawn"
            continue
        freedom += 1
        chi_square += (tokens.count(token) - DRAWS * prob) ** 2 / (DRAWS * prob)
    # about the 99.9th percentile of the chi-square distribution (Wilson and Hilferty, 1931)
    limit = freedom * (1 - 2 / (9 * max(freedom, 1)) + 3.09 * math.sqrt(2 / (9 * max(freedom, 1)))) ** 3
    assert chi_square <= limit


def test_the_positions_of_one_seed_draw_independently() -> None:
    positions = range(1, DRAWS + 1)
    tokens = draw([params(random_seed=5, runtime_top_p=1.0)] * DRAWS, [[0] * position for position in positions])
    probs = softmax(LOGITS.tolist())
    chi_square = sum((tokens.count(token) - DRAWS * prob) ** 2 / (DRAWS * prob) for token, prob in enumerate(probs))
    assert chi_square < 31.3  # 99.9 % of the chi-square distribution of 11 degrees of freedom
    same = sum(first == second for first, second in pairwise(tokens)) / DRAWS
    assert abs(same - sum(prob * prob for prob in probs)) < 0.03, "neighbours are not independent"


def test_equal_seeds_give_equal_tokens_and_others_differ() -> None:
    def drawn(seed: int) -> list[int]:
        return draw([params(random_seed=seed, runtime_top_p=1.0)] * 60, [[0] * length for length in range(1, 61)])

    assert drawn(7) == drawn(7)
    assert drawn(0) != drawn(1)
    assert drawn(2**64 - 1) != drawn(2**63)


def test_noise_is_even_over_seeds_and_positions() -> None:
    noise = [uniform(seed, position) for seed in range(64) for position in range(64)]
    assert all(0.0 <= value < 1.0 for value in noise)
    assert len(set(noise)) == len(noise)
    buckets = [sum(index <= value * 16 < index + 1 for value in noise) for index in range(16)]
    assert sum((count - 256) ** 2 / 256 for count in buckets) < 37.7  # 99.9 % of chi-square, 15 degrees of freedom


def test_a_row_draws_the_same_token_whatever_the_other_rows_ask_for() -> None:
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"runtime_top_k": 3},
        {"runtime_top_k": 1000, "runtime_top_p": 0.9},
        {"runtime_top_p": 0.4, "temperature": 0.7},
        {"min_p": 0.05},
        {"runtime_top_p": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0.0, "runtime_top_p": 0.9},
        {"runtime_top_k": 20, "bad_words_list": ((3,), (1, 4))},
    ]
    how = [params(random_seed=row, is_return_log_probs=True, **chance.choice(kinds)) for row in range(200)]
    prompts = [chance.choices(range(500), k=chance.randint(1, 30)) for _ in how]
    logits = torch.randn(len(how), 500, generator=generator) * 3
    sequences = [Sequence(row, prompt, params) for row, (prompt, params) in enumerate(zip(prompts, how, strict=True))]
    together = [sampled for [sampled] in sample(logits.clone(), sequences)]
    for row, sequence in enumerate(sequences):
        [[alone]] = sample(logits[row : row + 1].clone(), [sequence])
        assert alone.token == together[row].token, how[row]
        assert alone.log_prob == pytest.approx(together[row].log_prob, abs=1e-5)


def test_neither_top_k_nor_top_p_means_the_most_likely_token() -> None:
    for how in (
        params(),
        params(temperature=0.0, runtime_top_p=1.0),
        params(temperature=0.0, runtime_top_k=5, min_p=0.1),
    ):
        assert draw([how], [PROMPT]) == [0]
    assert draw([params(presence_penalty=1.0)], [PROMPT]) == [2], "penalties count when greedy, too"


def test_the_log_probability_is_that_before_top_k_and_top_p() -> None:
    how = params(runtime_top_k=2, runtime_top_p=0.5, temperature=0.7, presence_penalty=0.3, is_return_log_probs=True)
    [[sampled]] = sample(LOGITS[None].clone(), [Sequence(0, PROMPT, how)])
    probs = expected_probs(temperature=0.7, presence_penalty=0.3)
    assert sampled.log_prob == pytest.approx(math.log(probs[sampled.token]), abs=1e-5)


def test_top_k_beyond_the_vocabulary_keeps_all_of_it() -> None:
    tokens = draw([params(random_seed=seed, runtime_top_k=2**31) for seed in range(2000)], [PROMPT] * 2000)
    assert set(tokens) == set(range(VOCAB))


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_min_p_keeps_the_tokens_that_transformers_keeps(min_p: float, temperature: float) -> None:
    warper = MinPLogitsWarper(min_p)
    kept = {token for token, logit in enumerate(warper(None, LOGITS[None] / temperature)[0].tolist()) if logit > -1e9}
    how = [params(random_seed=seed, min_p=min_p, temperature=temperature) for seed in range(DRAWS)]
    assert set(draw(how, [PROMPT] * DRAWS)) == kept


def test_top_p_decays_to_its_minimum_and_is_reset_by_the_reset_id() -> None:
    how = params(runtime_top_p=0.8, top_p_decay=0.5, top_p_min=0.15, top_p_reset_ids=3)
    sequence = Sequence(0, [1], how)
    seen = [sequence.top_p]
    for token in (1, 2, 4, 5, 3, 1):
        sequence.append(token, 0.0, [])
        seen.append(sequence.top_p)
    assert seen == pytest.approx([0.8, 0.4, 0.2, 0.15, 0.15, 0.8, 0.4])


def test_top_p_stays_without_a_decay_and_a_minimum_never_raises_it() -> None:
    for how in (params(runtime_top_p=0.3), params(runtime_top_p=0.3, top_p_decay=0.9, top_p_min=0.5)):
        sequence = Sequence(0, [1], how)
        for token in range(5):
            sequence.append(token, 0.0, [])
            assert sequence.top_p == pytest.approx(0.3)


def test_the_decayed_top_p_is_what_the_sampler_uses() -> None:
    how = [params(random_seed=seed, runtime_top_p=1.0, top_p_decay=0.05) for seed in range(300)]
    sequences = [Sequence(row, PROMPT, params) for row, params in enumerate(how)]
    for sequence in sequences:
        sequence.append(9, 0.0, [])
    assert {sampled.token for [sampled] in sample(LOGITS.repeat(300, 1), sequences)} == {0}


def test_a_beam_is_offered_twice_as_many_tokens_as_there_are_beams_best_first() -> None:
    how = SamplingParams(request_output_len=4, end_ids=(END,), beam_width=3, temperature=0.5)
    [choices] = sample(LOGITS[None].clone(), [Sequence(0, PROMPT, how)])
    log_probs = torch.log_softmax(LOGITS / (0.5 + 1e-6), dim=-1)
    best = log_probs.topk(6)
    assert [choice.token for choice in choices] == best.indices.tolist()
    assert [choice.log_prob for choice in choices] == pytest.approx(best.values.tolist())
