"""The GPU's sampler chooses the tokens that the host's sampler chooses, step after step."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton's kernels are not installed here")

import triton.language as tl
from torch import Tensor

from gptj_triton.engine.gpu.sampling import _uniform, sample
from gptj_triton.engine.gpu.sampling_state import Blocks, SamplingState, Work, can_sample_on_device
from gptj_triton.engine.sampler import sample as sample_on_host
from gptj_triton.engine.sampler import uniform
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence

# Triton's interpreter warns at the bounds of loops, at -inf - -inf and at log(0).
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 300
SMALL = Blocks(chunk=64, group=4, groups=16, whole=256)  # with several of each in the vocabulary of these tests
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "runtime_top_p": 0.9},
    {"runtime_top_p": 1.0},
    {"runtime_top_p": 1.0, "temperature": 2.5},
    {"runtime_top_k": 1},
    {"runtime_top_k": 7, "temperature": 0.6},
    {"runtime_top_k": 40, "runtime_top_p": 0.8},
    {"runtime_top_k": 1024, "runtime_top_p": 0.95},
    {"runtime_top_k": 200},
    {"runtime_top_k": 100, "temperature": 9.0},
    {"runtime_top_p": 0.1},
    {"runtime_top_p": 0.7},
    {"runtime_top_p": 0.999, "temperature": 5.0},
    {"runtime_top_p": 0.9, "top_p_decay": 0.6, "top_p_min": 0.2, "top_p_reset_ids": 3},
    {"runtime_top_p": 1.0, "top_p_decay": 0.5},
    {"min_p": 0.1},
    {"min_p": 0.02, "temperature": 2.0},
    {"min_p": 1.0},
    {"min_p": 0.3, "runtime_top_k": 40, "runtime_top_p": 0.9},
    {"min_p": 0.01, "runtime_top_p": 0.999, "temperature": 5.0},
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "presence_penalty": -0.4},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"bad_words_list": ((2,), (5,), (77,))},
    {"bad_words_list": ((9,),), "frequency_penalty": 3.0, "min_length": 3},
    {"min_length": 2},
    {"min_length": 2, "end_ids": (11, 3, 299, 12)},
    {"min_length": 2, "end_ids": ()},
]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**dict[str, Any](request_output_len=100, end_ids=(11,), is_return_log_probs=True) | fields)


def make(how: list[SamplingParams], chance: random.Random, vocab: int = VOCAB) -> list[Sequence]:
    prompts = [chance.choices(range(vocab), k=chance.randint(1, 60)) for _ in how]
    return [Sequence(row, prompt, one) for row, (prompt, one) in enumerate(zip(prompts, how, strict=True))]


def make_logits(rows: int, seed: int, scale: float = 3.0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def random_params(count: int, chance: random.Random) -> list[SamplingParams]:
    seeds = [chance.choice([0, 1, 2**63, 2**64 - 1, chance.getrandbits(64)]) for _ in range(count)]
    return [params(random_seed=seed, **chance.choice(KINDS), **chance.choice(EXTRAS)) for seed in seeds]


def state_for(sequences: list[Sequence], rows: int, vocab: int = VOCAB, blocks: Blocks = SMALL) -> SamplingState:
    state = SamplingState(rows, vocab, DEVICE, blocks)
    state.load(sequences)
    return state


def expect_the_same(logits: Tensor, sequences: list[Sequence], state: SamplingState, work: Work | None = None) -> None:
    """One step of both samplers, after which the sequences have their tokens."""
    expected = [chosen for [chosen] in sample_on_host(logits.clone(), sequences)]
    tokens, log_probs = sample(logits.to(DEVICE), state, work or state.work)
    found = tokens.tolist()[: len(sequences)]
    for token, chosen, sequence in zip(found, expected, sequences, strict=True):
        assert token == chosen.token, sequence.params
    wanted = torch.tensor([chosen.log_prob for chosen in expected])
    torch.testing.assert_close(log_probs[: len(sequences)].cpu(), wanted, atol=2e-5, rtol=1e-5, equal_nan=True)
    for sequence, chosen in zip(sequences, expected, strict=True):
        sequence.append(chosen.token, chosen.log_prob, [])


@pytest.mark.parametrize("seed", range(4))
def test_all_kinds_of_rows_together_go_as_on_the_host_for_several_steps(seed: int) -> None:
    chance = random.Random(seed)
    sequences = make(random_params(10, chance), chance)
    state = state_for(sequences, 16)
    for step in range(3):
        logits = make_logits(10, 1000 * seed + step, scale=chance.choice([0.3, 1.0, 3.0, 10.0]))
        expect_the_same(logits, sequences, state)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_goes_alone(kind: dict[str, Any]) -> None:
    chance = random.Random(KINDS.index(kind))
    extras = chance.sample(EXTRAS, 2)
    sequences = make([params(random_seed=seed, **kind, **extra) for seed, extra in enumerate(extras)], chance)
    state = state_for(sequences, len(sequences))
    for step in range(3):
        expect_the_same(make_logits(len(sequences), step), sequences, state)


def test_logits_that_tie_are_kept_together() -> None:
    chance = random.Random(1)
    how = [params(random_seed=row, **kind) for row, kind in enumerate(KINDS)]
    sequences = make(how, chance)
    state = state_for(sequences, len(sequences))
    for step, grain in enumerate((0.25, 2.0, 100.0)):  # the last makes them nearly all equal
        logits = (make_logits(len(how), step) / grain).round() * grain * 0.3
        logits[::7, ::3] *= -1.0  # zeros of both signs
        expect_the_same(logits, sequences, state)


def test_zeros_of_both_signs_tie() -> None:
    how = [params(random_seed=seed, runtime_top_k=2, runtime_top_p=0.7) for seed in range(6)]
    sequences = make(how, random.Random(1))
    logits = torch.full((6, VOCAB), -9.0)
    logits[:, 20:30] = -0.0
    logits[:, 40:42] = torch.tensor([1.0, 0.0])
    expect_the_same(logits, sequences, state_for(sequences, 6))
    assert len({sequence.output[0] for sequence in sequences}) > 2


def test_top_p_decays_to_its_minimum_and_is_reset_by_the_reset_id() -> None:
    factual = {"runtime_top_p": 0.8, "top_p_decay": 0.5, "top_p_reset_ids": 3}
    sequences = make([params(top_p_min=least, **factual) for least in (0.15, 0.9)], random.Random(1))
    state = state_for(sequences, 2)
    for token in (1, 2, 4, 5, 3, 1):
        logits = make_logits(2, token)
        logits[:, token] = 50.0
        expect_the_same(logits, sequences, state)
        assert state.real[1].tolist() == [sequence.top_p for sequence in sequences]


def test_tokens_of_no_probability_are_not_chosen_and_rows_of_nothing_else_give_what_the_host_gives() -> None:
    chance = random.Random(2)
    sequences = make([params(random_seed=row, **kind) for row, kind in enumerate(KINDS[::2])], chance)
    state = state_for(sequences, len(sequences))
    logits = make_logits(len(sequences), 0)
    logits[:, ::2] = -torch.inf
    expect_the_same(logits, sequences, state)
    logits = make_logits(len(sequences), 1)
    logits[:, 5:] = -torch.inf  # fewer than top-k wants
    expect_the_same(logits, sequences, state)
    expect_the_same(torch.full_like(logits, -torch.inf), sequences, state)
    logits = make_logits(len(sequences), 2, scale=1e30)
    expect_the_same(logits, sequences, state)


def test_a_ban_of_every_token_lasts() -> None:
    everything = tuple((token,) for token in range(VOCAB))
    kinds: list[dict[str, Any]] = [{}, {"runtime_top_k": 5}, {"runtime_top_p": 0.5}, {"runtime_top_p": 1.0}]
    sequences = make([params(bad_words_list=everything, **kind) for kind in kinds], random.Random(3))
    state = state_for(sequences, 4)
    for step in range(3):
        expect_the_same(make_logits(4, step), sequences, state)


@pytest.mark.parametrize("work", [Work(), Work(counts=True), Work(draws=True), Work(True, True, True)], ids=str)
def test_greedy_rows_get_the_lowest_of_the_best_ids_whatever_else_runs(work: Work) -> None:
    sequences = make([params() for _ in range(6)], random.Random(4))
    state = state_for(sequences, 6)
    assert state.work == Work()
    for step in range(2):
        logits = (make_logits(6, step) / 4).round()
        logits[0] = 1.0
        expect_the_same(logits, sequences, state, work)


@pytest.mark.parametrize("vocab", [1, 5, 65, 1000])
def test_any_size_of_vocabulary_will_do(vocab: int) -> None:
    chance = random.Random(vocab)
    how = [params(random_seed=row, end_ids=(0,), **kind) for row, kind in enumerate(KINDS[1::2])]
    sequences = make(how, chance, vocab)
    state = state_for(sequences, len(how), vocab)
    expect_the_same(make_logits(len(how), 0, vocab=vocab), sequences, state)


def test_the_size_of_gptj_with_the_blocks_that_a_gpu_gets() -> None:
    vocab = 50400
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.2},
        {"runtime_top_p": 1.0, "temperature": 0.9},
        {"runtime_top_k": 50, "runtime_top_p": 0.9},
        {"runtime_top_k": 1000},
        {"runtime_top_p": 0.8, "temperature": 0.5},
        {"runtime_top_p": 0.95, "temperature": 2.0, "bad_words_list": ((50399,),)},
    ]
    sequences = make([params(random_seed=row, **kind) for row, kind in enumerate(kinds)], random.Random(5), vocab)
    state = state_for(sequences, len(kinds), vocab, Blocks())
    for step in range(2):
        logits = make_logits(len(kinds), step, vocab=vocab)
        expect_the_same(logits.half().float() if step else logits, sequences, state)


def test_rows_that_stay_go_on_from_what_the_device_knows_though_the_host_lags_behind() -> None:
    chance = random.Random(6)
    sequences = make(random_params(8, chance), chance)
    state = SamplingState(6, VOCAB, DEVICE, SMALL)
    lagging: list[tuple[Sequence, int, float]] = []
    for step in range(7):
        rows = chance.sample(sequences, k=chance.randint(2, 6))
        # The host appends late: rows of the step before are one token behind when they are loaded again.
        absent = [late for late in lagging if late[0] not in rows]
        for sequence, token, log_prob in absent:
            sequence.append(token, log_prob, [])
        state.load(rows)
        for late in lagging:
            if late not in absent:
                late[0].append(late[1], late[2], [])
        logits = make_logits(len(rows), step)
        expected = [chosen for [chosen] in sample_on_host(logits.clone(), rows)]
        tokens, _ = sample(logits.to(DEVICE), state, state.work)
        assert tokens.tolist() == [chosen.token for chosen in expected]
        lagging = [(row, chosen.token, chosen.log_prob) for row, chosen in zip(rows, expected, strict=True)]


def test_rows_begin_anew_after_the_host_chose_their_tokens() -> None:
    chance = random.Random(7)
    sequences = make(random_params(5, chance), chance)
    state = state_for(sequences, 5)
    expect_the_same(make_logits(5, 0), sequences, state)
    for sequence, [chosen] in zip(sequences, sample_on_host(make_logits(5, 1), sequences), strict=True):
        sequence.append(chosen.token, chosen.log_prob, [])
    state.load([])
    state.load(sequences)
    expect_the_same(make_logits(5, 2), sequences, state)


def test_rows_without_a_sequence_are_left_alone() -> None:
    sequences = make([params(runtime_top_k=5, frequency_penalty=1.0)] * 2, random.Random(8))
    state = state_for(sequences, 8)
    logits = make_logits(6, 0)
    given = logits.to(DEVICE, copy=True)
    state.tokens.fill_(-7)
    sample(given, state, state.work)
    assert (state.tokens[:2] >= 0).all() and (state.tokens[2:] == -7).all()
    assert torch.equal(given[2:].cpu(), logits[2:])
    assert (state.whole[0, 2:] == -1).all()


@pytest.mark.parametrize("end_ids", [(), (7,), (7, 8), (5, 6, 7, 8)], ids=str)
def test_no_end_id_is_chosen_before_the_minimum_length(end_ids: tuple[int, ...]) -> None:
    how = [params(end_ids=end_ids, min_length=2, **kind) for kind in ({}, {"runtime_top_k": 3}, {"runtime_top_p": 1.0})]
    sequences = make(how, random.Random(11))
    state = state_for(sequences, 3)
    for step in range(3):
        logits = make_logits(3, step)
        logits[:, list(end_ids)] = 99.0
        expect_the_same(logits, sequences, state)
    ended = [[token in end_ids for token in sequence.output] for sequence in sequences]
    assert ended == [[False, False, bool(end_ids)]] * 3


def test_slots_of_sequences_that_ended_are_used_again() -> None:
    state = SamplingState(3, VOCAB, DEVICE, SMALL)
    for step in range(5):
        sequences = make([params(frequency_penalty=2.0, bad_words_list=((step,),))] * 3, random.Random(step))
        state.load(sequences)
        expect_the_same(make_logits(3, step), sequences, state)


@triton.jit
def _uniform_kernel(seeds, positions, out):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    tl.store(out + row, _uniform(tl.load(seeds + row), tl.load(positions + row)))


def test_the_noise_is_the_hosts_bit_for_bit() -> None:
    chance = random.Random(9)
    seeds = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1] + [chance.getrandbits(64) for _ in range(300)]
    positions = [0, 1, 2, 2047, 2**31 - 1, 2**31, 2**32] + [chance.randrange(1, 4096) for _ in range(300)]
    signed = torch.tensor([seed - (1 << 64 if seed >> 63 else 0) for seed in seeds], device=DEVICE)
    found = torch.empty(len(seeds), dtype=torch.float64, device=DEVICE)
    _uniform_kernel[(len(seeds),)](signed, torch.tensor(positions, device=DEVICE), found)
    assert found.tolist() == [uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)]


def test_what_runs_is_what_some_row_asks_for() -> None:
    assert Work.of([]) == Work()
    assert Work.of([params(), params(temperature=0.0, runtime_top_k=4, min_length=3)]) == Work()
    assert Work.of([params(bad_words_list=((1,),))]) == Work(counts=True)
    assert Work.of([params(), params(runtime_top_p=1.0)]) == Work(draws=True)
    assert Work.of([params(runtime_top_p=1.0, top_p_decay=0.9)]) == Work(draws=True, searches=True)
    assert Work.of([params(min_p=0.1)]) == Work(draws=True, searches=True)
    assert Work.of([params(runtime_top_k=3), params(presence_penalty=1.0)]) == Work(True, True, True)


def test_beams_bad_words_of_several_tokens_and_many_end_ids_are_the_hosts() -> None:
    assert can_sample_on_device(params(bad_words_list=((1,), (2,)), runtime_top_k=3, frequency_penalty=1.0))
    assert not can_sample_on_device(params(bad_words_list=((1,), (2, 3))))
    assert not can_sample_on_device(params(beam_width=2))
    assert can_sample_on_device(params(end_ids=(1, 2, 3, 4), min_length=1))
    assert can_sample_on_device(params(end_ids=(1, 2, 3, 4, 5)))
    assert not can_sample_on_device(params(end_ids=(1, 2, 3, 4, 5), min_length=1))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a graph needs a GPU")
def test_a_captured_step_gives_what_the_host_gives() -> None:
    chance = random.Random(10)
    sequences = make(random_params(8, chance), chance)
    state = state_for(sequences, 8)
    logits = torch.zeros(8, VOCAB, device=DEVICE)
    work = Work(True, True, True)
    sample(logits, state, work)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = sample(logits, state, work)
    state.load([])
    state.load(sequences)
    for step in range(4):
        given = make_logits(8, step)
        expected = [chosen for [chosen] in sample_on_host(given.clone(), sequences)]
        logits.copy_(given)
        graph.replay()
        assert tokens.tolist() == [chosen.token for chosen in expected]
        for sequence, chosen in zip(sequences, expected, strict=True):
            sequence.append(chosen.token, chosen.log_prob, [])
