"""The forward pass against `transformers`, and the promise that a token's result depends on its own context alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.weights import load_weights
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.eager.batch import build_batch
from gptj_triton.engine.eager.transformer import Transformer, linear
from gptj_triton.engine.kv_cache import PAGE_SIZE, KVCache
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.load import load_engine
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Sequence
from gptj_triton.engine.step_plan import plan_step

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "three heads, odd vocabulary": {},
    "half of each head turns": {"n_embd": 128, "n_head": 4, "rotary_dim": 16},
    "whole heads turn": {"n_embd": 64, "n_head": 2, "rotary_dim": 32},
    "narrow MLP": {"n_inner": 200},
    "other epsilon": {"layer_norm_epsilon": 1e-2},
    "CodeGen, four heads": {"family": "CodeGen", "n_embd": 96, "n_head": 4, "rotary_dim": 8},
    "CodeGen, whole heads turn": {"family": "CodeGen", "n_embd": 128, "n_head": 8, "n_inner": 200},
    "CodeGen, twelve heads": {"family": "CodeGen", "n_embd": 96, "n_head": 12, "rotary_dim": 4},
}


class Steps:
    """Computes chunks of sequences by hand; every token of a chunk is sampled, so that each one's logits are seen."""

    def __init__(self, checkpoint: Path, num_pages: int = 256) -> None:
        self.config = ModelConfig.from_huggingface(checkpoint)
        self.transformer = Transformer(self.config, load_weights(checkpoint, self.config, torch.float32, CPU))
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.cache = KVCache(self.config, num_pages, torch.float32, CPU)

    def sequence(self, tokens: list[int]) -> Sequence:
        return Sequence(0, tokens, SamplingParams(request_output_len=1, end_ids=(0,)))

    @torch.inference_mode()
    def compute(self, *chunks: tuple[Sequence, int]) -> dict[int, Tensor]:
        """One step: the next tokens of each sequence; returns the logits [tokens, V] by the sequence's id()."""
        for sequence, num_tokens in chunks:
            assert self.pool.grow(sequence, sequence.num_cached + num_tokens)
        plan, _ = plan_step([Scheduled(*chunk) for chunk in chunks], self.pool)
        owners = [self._owner(page, chunks) for page in plan.pages]
        plan.last_rows = list(range(len(owners)))
        logits = self.transformer.forward(
            build_batch(plan, self.config.num_heads, self.config.head_size, PAGE_SIZE, torch.float32, CPU), self.cache
        )
        for sequence, num_tokens in chunks:
            sequence.num_cached += num_tokens
        return {
            id(sequence): logits[[row for row, owner in enumerate(owners) if owner is sequence]]
            for sequence, _ in chunks
        }

    def prefill(self, tokens: list[int], chunk: int) -> Tensor:
        """Logits [len(tokens), V] of a sequence alone, computed `chunk` tokens a step; its pages are given back."""
        sequence = self.sequence(tokens)
        logits = []
        while sequence.num_uncached:
            logits.append(self.compute((sequence, min(chunk, sequence.num_uncached)))[id(sequence)])
        self.pool.release(sequence)
        return torch.cat(logits)

    @staticmethod
    def _owner(page: int, chunks: tuple[tuple[Sequence, int], ...]) -> Sequence:
        return next(sequence for sequence, _ in chunks if page in sequence.pages)


def random_tokens(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


@pytest.fixture(scope="module")
def steps(make_checkpoint: Callable[..., Path]) -> Steps:
    return Steps(make_checkpoint())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_those_of_transformers(shape: dict[str, Any], make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint(**shape)
    steps = Steps(checkpoint)
    tokens = random_tokens(70, steps.config.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.5, "the model says the same everywhere, so the comparison shows nothing"
    torch.testing.assert_close(steps.prefill(tokens, chunk=70), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_200_greedy_tokens_equal_those_of_transformers(
    shape: dict[str, Any], make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint(**shape)
    engine = load_engine(EngineConfig(str(checkpoint), device="cpu", kv_cache_gib=0.05))
    prompt = random_tokens(9, 256)
    params = SamplingParams(request_output_len=200, end_ids=engine.model_config.end_ids, min_length=200)
    sequence = Sequence(0, prompt, params)
    engine.submit(sequence)
    while engine.busy:
        engine.step()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    lengths = {"max_new_tokens": 200, "min_new_tokens": 200}
    answer = model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=256, **lengths)[0]
    expected = answer[len(prompt) :].tolist()
    assert len(set(expected)) > 5, "the model repeats itself, so the comparison shows nothing"
    assert sequence.output == expected


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(96, 257), (256, 1792), (1280, 256), (5120, 64), (4096, 512)],
)
def test_a_row_of_linear_is_the_same_bits_however_many_rows_there_are(in_features: int, out_features: int) -> None:
    generator = torch.Generator().manual_seed(in_features)
    rows = torch.randn(300, in_features, generator=generator)
    weight = torch.randn(in_features, out_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    alone = torch.cat([linear(row[None], weight, bias) for row in rows])
    for count in (2, 3, 4, 5, 7, 8, 16, 17, 31, 64, 65, 100, 127, 128, 129, 130, 191, 255, 256, 257, 299, 300):
        assert torch.equal(linear(rows[:count], weight, bias), alone[:count]), f"{count} rows"
        assert torch.equal(linear(rows[-count:], weight, bias), alone[-count:]), f"the last {count} rows"


def test_a_token_is_the_same_bits_alone_and_in_chunks_of_any_size(steps: Steps) -> None:
    tokens = random_tokens(600, steps.config.vocab_size)
    one_by_one = steps.prefill(tokens, chunk=1)
    for chunk in (600, 256, 97, 3):
        assert torch.equal(steps.prefill(tokens, chunk), one_by_one), f"chunks of {chunk}"


@pytest.mark.usefixtures("two_threads")
def test_a_token_is_the_same_bits_when_threads_share_the_work(make_checkpoint: Callable[..., Path]) -> None:
    steps = Steps(make_checkpoint(n_embd=256, n_head=4, n_inner=1024, vocab_size=4096, rotary_dim=32))
    tokens = random_tokens(140, steps.config.vocab_size)
    one_by_one = steps.prefill(tokens, chunk=1)
    for chunk in (131, 140):
        assert torch.equal(steps.prefill(tokens, chunk), one_by_one)


def test_a_token_is_the_same_bits_whatever_its_neighbours_are(steps: Steps) -> None:
    lengths = [1, 2, 15, 16, 17, 64, 65, 130, 257, 511, 513, 640]
    contexts = [random_tokens(length + 4, steps.config.vocab_size, seed=length) for length in lengths]
    alone = [steps.prefill(context, chunk=128)[-4:] for context in contexts]
    sequences = [steps.sequence(context) for context in contexts]
    for sequence in sequences:
        steps.compute((sequence, sequence.num_tokens - 4))
    others = [steps.sequence(random_tokens(90, steps.config.vocab_size, seed=7)) for _ in range(2)]
    together: dict[int, list[Tensor]] = {id(sequence): [] for sequence in sequences}
    for number in range(4):
        prefilling = [(other, 11 + number) for other in others]
        logits = steps.compute(*[(sequence, 1) for sequence in sequences], *prefilling)
        for sequence in sequences:
            together[id(sequence)].append(logits[id(sequence)])
    for length, expected, sequence in zip(lengths, alone, sequences, strict=True):
        assert torch.equal(torch.cat(together[id(sequence)]), expected), f"context of {length}"
    for sequence in [*sequences, *others]:
        steps.pool.release(sequence)


def test_what_other_sequences_left_in_a_page_is_never_seen(steps: Steps) -> None:
    tokens = random_tokens(21, steps.config.vocab_size)
    expected = steps.prefill(tokens, chunk=21)
    steps.cache.keys.fill_(1e4)
    steps.cache.values.fill_(1e4)
    assert torch.equal(steps.prefill(tokens, chunk=21), expected)
