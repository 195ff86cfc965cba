"""The engine on the embedded model: every request gets the tokens it would get alone, and ends where it should."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.load import load_engine
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence
from gptj_triton.text.token_bytes import load_token_bytes

END = 4095
LENGTHS = [1, 2, 15, 16, 17, 100, 500]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**dict[str, Any](request_output_len=24, end_ids=(END,)) | fields)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(END), k=length)


def run(engine: Engine, requests: dict[int, list[Sequence]]) -> bool:
    """Submit sequences at the steps that are the keys, and run until all ended; true if one was preempted."""
    preempted = False
    step = 0
    while engine.busy or step <= max(requests):
        for sequence in requests.get(step, []):
            engine.submit(sequence)
        if engine.busy:
            before = {sequence.key: sequence.num_cached for sequence in engine.scheduler}
            engine.step()
            preempted |= any(sequence.num_cached < before[sequence.key] for sequence in engine.scheduler)
        engine.check_integrity()
        step += 1
        assert step < 5000, "the engine does not come to an end"
    return preempted


def alone(engine: Engine, prompt: list[int], how: SamplingParams) -> Sequence:
    """One sequence, run to its end with nothing beside it."""
    sequence = Sequence("alone", prompt, how)
    engine.submit(sequence)
    while engine.busy:
        engine.step()
    engine.check_integrity()
    return sequence


def greedy_of(reference: Any, prompt: list[int], **settings: Any) -> list[int]:
    """What `transformers` continues the prompt with, greedily."""
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": END} | settings
    answer: list[int] = reference.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    return answer


def mixed_requests(count: int, longest: int, stop_strings: list[bytes]) -> list[Sequence]:
    """Requests of all kinds, the same ones on every call."""
    chance = random.Random(1)
    kinds: list[dict[str, Any]] = [
        {},
        {"runtime_top_k": 5, "temperature": 0.8},
        {"runtime_top_p": 0.9},
        {"runtime_top_k": 40, "runtime_top_p": 0.7, "temperature": 1.3, "is_return_log_probs": True},
        {"runtime_top_p": 1.0, "repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"runtime_top_p": 0.95, "top_p_decay": 0.9, "top_p_min": 0.1, "top_p_reset_ids": 14},
        {"min_length": 8, "end_ids": (14,)},
        {"runtime_top_k": 50, "bad_words_list": ((13,), (259, 718)), "stop_strings": tuple(stop_strings)},
    ]
    return [
        Sequence(
            number,
            random_prompt(chance.choice([1, 3, 16, 17, 40, longest]), seed=number),
            params(
                request_output_len=chance.randint(8, 16), random_seed=chance.getrandbits(64), **chance.choice(kinds)
            ),
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def token_bytes(storyteller: Path) -> list[bytes]:
    return load_token_bytes(storyteller / "tokenizer.json", END + 1)


@pytest.fixture(scope="module")
def small_engine(storyteller: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The embedded model with a context of 256 tokens and a KV cache that holds just one full context."""
    directory = tmp_path_factory.mktemp("small_context")
    config = json.loads((storyteller / "config.json").read_text()) | {"n_positions": 256}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json"):
        (directory / name).symlink_to(storyteller / name)
    page_bytes = 2 * config["n_layer"] * config["n_embd"] * 16 * 4
    gib = 16.5 * page_bytes / 2**30
    return load_engine(EngineConfig(str(directory), device="cpu", kv_cache_gib=gib, step_tokens=48))


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_equal_those_of_transformers(length: int, engine: Engine, reference: Any) -> None:
    prompt = random_prompt(length)
    assert alone(engine, prompt, params()).output == greedy_of(reference, prompt)


def test_greedy_tokens_equal_those_of_transformers_among_sixteen_others(engine: Engine, reference: Any) -> None:
    checked = [Sequence(("checked", length), random_prompt(length), params()) for length in LENGTHS]
    others = [Sequence(("other", seed), random_prompt(30 + seed, seed), params(runtime_top_k=9)) for seed in range(16)]
    run(engine, {0: others[:8], 2: checked[:4], 3: others[8:], 5: checked[4:]})
    for sequence in checked:
        assert sequence.output == greedy_of(reference, sequence.prompt), f"prompt of {len(sequence.prompt)}"


def test_each_of_many_mixed_requests_gets_the_tokens_it_gets_alone(engine: Engine, solitary: Engine) -> None:
    together = mixed_requests(200, longest=150, stop_strings=[b"the", b" and"])
    chance = random.Random(2)
    arrivals: dict[int, list[Sequence]] = {}
    for sequence in together:
        arrivals.setdefault(chance.randint(0, 180), []).append(sequence)
    run(engine, arrivals)
    assert {sequence.finish_reason for sequence in together} == {"stop", "length"}
    for sequence in together:
        expected = alone(solitary, sequence.prompt, sequence.params)
        got = (sequence.output, sequence.finish_reason)
        assert got == (expected.output, expected.finish_reason), f"request {sequence.key}"
        assert sequence.log_probs == pytest.approx(expected.log_probs, abs=1e-5)


def test_a_kv_cache_too_small_for_all_changes_no_token_and_loses_no_page(
    small_engine: Engine, solitary: Engine
) -> None:
    together = mixed_requests(24, longest=200, stop_strings=[])
    preempted = run(small_engine, {0: together[:8], 3: together[8:16], 9: together[16:]})
    assert preempted, "nothing was preempted, so the test shows nothing"
    for sequence in together:
        assert sequence.output == alone(solitary, sequence.prompt, sequence.params).output, f"request {sequence.key}"


def test_a_request_ends_after_the_tokens_it_asked_for(engine: Engine) -> None:
    for length in (1, 2, 17):
        sequence = alone(engine, random_prompt(5), params(request_output_len=length))
        assert (len(sequence.output), sequence.finish_reason) == (length, "length")


def test_a_request_can_fill_the_context_to_its_last_token(small_engine: Engine) -> None:
    sequence = alone(small_engine, random_prompt(250), params(request_output_len=6, min_length=6))
    assert (len(sequence.output), sequence.finish_reason) == (6, "length")
    with pytest.raises(AssertionError):
        small_engine.submit(Sequence(0, random_prompt(250), params(request_output_len=7)))
    assert not small_engine.busy


def test_the_end_id_is_the_last_token_of_what_it_ends(engine: Engine) -> None:
    free = alone(engine, random_prompt(5), params()).output
    end = free[6]
    sequence = alone(engine, random_prompt(5), params(end_ids=(end,)))
    assert sequence.output == free[: free.index(end) + 1]
    assert sequence.finish_reason == "stop"


def test_the_end_id_is_never_chosen_before_the_minimum_length(engine: Engine, reference: Any) -> None:
    prompt = random_prompt(5)
    end = alone(engine, prompt, params()).output[2]
    for least in (1, 2, 3, 24):
        sequence = alone(engine, prompt, params(end_ids=(end,), min_length=least))
        assert sequence.output == greedy_of(reference, prompt, eos_token_id=end, min_new_tokens=least)
        assert end not in sequence.output[:least]


def test_bad_words_of_one_and_of_several_tokens_never_appear(engine: Engine, reference: Any) -> None:
    prompt = random_prompt(7)
    free = alone(engine, prompt, params()).output
    crossing = (prompt[-1], free[0])  # begins in the prompt
    for words in [
        ((free[0],),),
        ((free[3], free[4]),),
        ((free[5],), tuple(free[8:11])),
        (crossing,),
        ((0,), (free[1],)),
    ]:
        sequence = alone(engine, prompt, params(bad_words_list=words))
        assert sequence.output != free
        assert sequence.output == greedy_of(reference, prompt, bad_words_ids=[list(word) for word in words])


def test_token_zero_can_be_banned(engine: Engine) -> None:
    prompt = [0, 0, 0]
    wanted = params(presence_penalty=-1000.0, request_output_len=4)  # what stands in the prompt is all but certain
    assert alone(engine, prompt, wanted).output == [0, 0, 0, 0]
    banned = params(presence_penalty=-1000.0, request_output_len=4, bad_words_list=((0,),))
    assert 0 not in alone(engine, prompt, banned).output


def test_repetition_penalty_is_that_of_transformers(engine: Engine, reference: Any) -> None:
    prompt = random_prompt(20)
    sequence = alone(engine, prompt, params(repetition_penalty=1.4))
    assert sequence.output == greedy_of(reference, prompt, repetition_penalty=1.4)
    assert sequence.output != greedy_of(reference, prompt)


def test_a_stop_word_ends_generation_only_in_the_new_tokens(engine: Engine) -> None:
    prompt = random_prompt(5)
    free = alone(engine, prompt, params()).output
    for start, length in ((4, 1), (4, 2), (7, 3), (0, 1)):
        word = tuple(free[start : start + length])
        first = next(end for end in range(length, 25) if tuple(free[end - length : end]) == word)
        sequence = alone(engine, prompt, params(stop_words_list=(tuple(prompt), word)))
        assert (sequence.output, sequence.finish_reason) == (free[:first], "stop")
    overlapping = alone(engine, prompt, params(stop_words_list=((prompt[-1], free[0]),)))
    assert overlapping.output == free, "a word that begins in the prompt is no stop word of the answer"


def test_a_stop_string_ends_generation_at_the_token_that_completes_it(engine: Engine, token_bytes: list[bytes]) -> None:
    prompt = random_prompt(5)
    free = alone(engine, prompt, params()).output
    pieces = [token_bytes[token] for token in free]
    three_tokens = pieces[8][-1:] + pieces[9] + pieces[10][:1]
    in_one_token = max(pieces, key=len)[1:3]
    whole_token = pieces[12]
    for stop in (three_tokens, in_one_token, whole_token, b"".join(pieces[:6]), pieces[3][:1]):
        first = next(end for end in range(25) if stop in b"".join(pieces[:end]))
        sequence = alone(engine, prompt, params(stop_strings=(b"never said", stop)))
        assert (sequence.output, sequence.finish_reason) == (free[:first], "stop"), stop
    assert alone(engine, prompt, params(stop_strings=(b"never said",))).output == free


def test_a_stop_string_is_found_across_the_bytes_of_an_emoji(storyteller: Path, token_bytes: list[bytes]) -> None:
    tokens = Tokenizer.from_file(str(storyteller / "tokenizer.json")).encode("a cat 🐉🐉 sat").ids
    for stop in ("🐉", "t 🐉", "🐉🐉", "🐉 s"):
        sequence = Sequence(0, [1], params(stop_strings=(stop.encode(),)))
        for token in tokens:
            sequence.append(token, 0.0, token_bytes)
            if sequence.finish_reason:
                break
        text = b"".join(token_bytes[token] for token in sequence.output)
        assert sequence.finish_reason == "stop"
        assert stop.encode() in text
        assert stop.encode() not in text[: -len(token_bytes[sequence.output[-1]])]
    assert len(token_bytes[tokens[-3]]) < 4, "the emoji is one token, so the test shows nothing"


def test_a_cancelled_request_ends_with_what_it_has_and_the_others_go_on(engine: Engine) -> None:
    sequences = [Sequence(seed, random_prompt(20, seed), params()) for seed in range(3)]
    waiting = Sequence("waiting", random_prompt(500), params())
    for sequence in [*sequences, waiting]:
        engine.submit(sequence)
    for _ in range(5):
        engine.step()
    late = Sequence("late", random_prompt(20), params())
    engine.submit(late)
    assert engine.cancel("late") == [late]
    assert engine.cancel(1) == [sequences[1]]
    engine.check_integrity()
    assert engine.cancel(1) == []
    while engine.busy:
        engine.step()
    engine.check_integrity()
    assert (sequences[1].finish_reason, late.finish_reason, late.output) == ("cancelled", "cancelled", [])
    assert 0 < len(sequences[1].output) < 24
    for sequence in (sequences[0], sequences[2], waiting):
        assert sequence.output == alone(engine, sequence.prompt, sequence.params).output


@pytest.mark.parametrize("how", [{}, {"runtime_top_k": 30}, {"runtime_top_p": 0.8}], ids=str)
def test_log_probs_are_those_of_the_whole_vocabulary(how: dict[str, Any], engine: Engine, reference: Any) -> None:
    prompt = random_prompt(30)
    sequence = alone(engine, prompt, params(is_return_log_probs=True, **how))
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + sequence.output])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(sequence.output)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sequence.log_probs), expected, rtol=1e-3, atol=1e-3)


def test_log_probs_are_kept_only_when_asked_for(engine: Engine) -> None:
    assert alone(engine, random_prompt(3), params()).log_probs == []


@pytest.mark.parametrize(
    "how",
    [
        {"presence_penalty": -1000.0, "frequency_penalty": -1000.0, "runtime_top_p": 0.5},
        {"presence_penalty": 1000.0, "frequency_penalty": 1000.0, "runtime_top_k": 3, "runtime_top_p": 0.5},
        {"bad_words_list": tuple((token,) for token in range(END + 1)), "runtime_top_p": 0.5},
        {"temperature": 1e-30, "repetition_penalty": 0.001, "runtime_top_p": 0.5},
    ],
    ids=["largest favour", "largest penalty", "every token banned", "largest logits"],
)
def test_parameters_that_leave_no_distribution_harm_nobody_else(
    how: dict[str, Any], engine: Engine, storyteller: Path
) -> None:
    tried = load_engine(EngineConfig(str(storyteller), device="cpu", kv_cache_gib=0.02))
    others = [Sequence(seed, random_prompt(9, seed), params(runtime_top_p=0.9, random_seed=seed)) for seed in range(2)]
    run(tried, {0: [others[0], Sequence("extreme", [5, 6], params(request_output_len=4, **how)), others[1]]})
    for sequence in others:
        assert sequence.output == alone(engine, sequence.prompt, sequence.params).output
