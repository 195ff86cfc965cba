"""A model on several ranks: the text of one, whatever the checkpoint's split; and ranks that live and die together.

The ranks are real processes that add their results up by Gloo, as GPUs do by NCCL.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import CodeGenForCausalLM

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import Shard
from gptj_triton.checkpoint.weights import load_weights
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import ConfigError, UnavailableError
from gptj_triton.process.client import Answer, EngineClient, Failed
from gptj_triton.process.messages import Finished, Result

END = 256
EIGHT_HEADS = {"n_embd": 128, "n_head": 8, "rotary_dim": 8, "n_inner": 200, "n_positions": 128}
REQUESTS = [
    SamplingParams(request_output_len=40, end_ids=(END,), is_return_log_probs=True),
    SamplingParams(request_output_len=30, end_ids=(END,), is_return_log_probs=True, repetition_penalty=1.3),
    SamplingParams(request_output_len=30, end_ids=(END,), is_return_log_probs=True, runtime_top_k=40, random_seed=7),
    SamplingParams(request_output_len=12, end_ids=(END,), is_return_log_probs=True, beam_width=4),
]

# A frontend does not wait for the engine that it started: it may have to leave it to other frontends.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")


@contextlib.contextmanager
def frontend_to(checkpoint: Path, ranks: int, context_length: int = 0) -> Iterator[EngineClient]:
    """A frontend to an engine of `ranks` processes; afterwards none of them may be left."""
    config = EngineConfig(
        str(checkpoint),
        ranks,
        device="cpu",
        engine_python=sys.executable,
        kv_cache_gib=0.1,
        context_length=context_length,
    )
    with subprocess.Popen(["sleep", "600"]) as server:
        try:
            frontend = EngineClient(config, server.pid, "frontend")
            family = ranks_of(frontend)
            try:
                yield frontend
                family += ranks_of(frontend)
            finally:
                frontend.close()
            _, alive = psutil.wait_procs(family, timeout=30)
            assert alive == []
        finally:
            server.kill()


def ranks_of(frontend: EngineClient) -> list[psutil.Process]:
    """The processes of its engine, rank 0 first."""
    leader = psutil.Process(frontend.engine_info.engine_pid)
    return [leader, *leader.children()]


def results(frontend: EngineClient, prompts: list[list[int]]) -> list[list[Result]]:
    """Every prompt with every kind of request, all at once; in order."""
    answers: dict[int, Answer] = {}
    waiting: queue.Queue[int] = queue.Queue()

    def take(index: int) -> Callable[[Answer], None]:
        def note(answer: Answer) -> None:
            answers[index] = answer
            waiting.put(index)

        return note

    requests = [(prompt, params) for prompt in prompts for params in REQUESTS]
    for index, (prompt, params) in enumerate(requests):
        frontend.submit(prompt, params, take(index))
    for _ in requests:
        waiting.get(timeout=120)
    return [answer.results for _, answer in sorted(answers.items()) if isinstance(answer, Finished)]


def assert_same_text(got: list[list[Result]], expected: list[list[Result]]) -> None:
    flat = [result for group in got for result in group]
    references = [result for group in expected for result in group]
    assert [result.tokens for result in flat] == [result.tokens for result in references]
    for result, reference in zip(flat, references, strict=True):
        assert result.log_probs == pytest.approx(reference.log_probs, abs=1e-4)


PROMPTS = [[1, 2, 3], list(range(5, 60))]


@pytest.fixture(scope="module")
def eight_heads(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(**EIGHT_HEADS)


@pytest.fixture(scope="module")
def expected(eight_heads: Path) -> list[list[Result]]:
    """What one rank makes of the Hugging Face files."""
    with frontend_to(eight_heads, ranks=1) as frontend:
        found = results(frontend, PROMPTS)
    assert len(found) == len(PROMPTS) * len(REQUESTS)
    return found


@pytest.mark.parametrize(("split", "ranks"), [(8, 1), (1, 2), (8, 2), (2, 4)])
def test_a_checkpoint_of_any_split_runs_on_any_number_of_ranks(
    eight_heads: Path,
    expected: list[list[Result]],
    write_fastertransformer: Callable[..., Path],
    tmp_path: Path,
    split: int,
    ranks: int,
) -> None:
    files = write_fastertransformer(eight_heads, tmp_path / f"{split}-gpu", split)
    with frontend_to(files, ranks, context_length=128) as frontend:
        assert len(ranks_of(frontend)) == ranks
        assert_same_text(results(frontend, PROMPTS), expected)


def test_on_two_ranks_a_request_gets_the_same_bits_alone_and_among_others(eight_heads: Path) -> None:
    with frontend_to(eight_heads, ranks=2) as frontend:
        together = results(frontend, PROMPTS)
        assert results(frontend, PROMPTS[:1]) + results(frontend, PROMPTS[1:]) == together


def test_a_codegen_on_two_ranks_writes_the_greedy_tokens_of_transformers(make_checkpoint: Callable[..., Path]) -> None:
    codegen = make_checkpoint("CodeGen", **EIGHT_HEADS)
    model = CodeGenForCausalLM.from_pretrained(codegen, dtype=torch.float32).eval()
    with frontend_to(codegen, ranks=2) as frontend:
        found = results(frontend, PROMPTS)
    for prompt, [greedy] in zip(PROMPTS, found[:: len(REQUESTS)], strict=True):
        answer = model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=END, max_new_tokens=40)
        assert greedy.tokens == answer[0, len(prompt) :].tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shards_of_all_ranks_make_up_the_weights(eight_heads: Path, ranks: int) -> None:
    config = ModelConfig.read(eight_heads)
    whole, *shards = (
        load_weights(eight_heads, config, torch.float32, torch.device("cpu"), shard)
        for shard in [Shard(), *(Shard(rank, ranks) for rank in range(ranks))]
    )
    part = config.hidden_size // ranks
    for number, layer in enumerate(whole.layers):
        layers = [shard.layers[number] for shard in shards]
        for kind in range(3):
            columns = [shard.in_weight[:, kind * part : (kind + 1) * part] for shard in layers]
            assert torch.equal(
                torch.cat(columns, 1), layer.in_weight[:, kind * config.hidden_size : (kind + 1) * config.hidden_size]
            )
        inner = torch.cat([shard.in_weight[:, 3 * part :] for shard in layers], 1)
        assert torch.equal(inner, layer.in_weight[:, 3 * config.hidden_size :])
        rows = [shard.out_weight[:part] for shard in layers] + [shard.out_weight[part:] for shard in layers]
        assert torch.equal(torch.cat(rows), layer.out_weight)
        assert torch.equal(sum((shard.out_bias for shard in layers), torch.zeros(())), layer.out_bias)
    assert all(torch.equal(shard.head_weight, whole.head_weight) for shard in shards)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused(eight_heads: Path) -> None:
    with (
        pytest.raises(ConfigError, match="a split into 3 does not divide the heads, 8"),
        frontend_to(eight_heads, ranks=3),
    ):
        pass


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_takes_the_others_along_and_a_new_engine_serves(eight_heads: Path, victim: int) -> None:
    answers: queue.Queue[Answer] = queue.Queue()
    long = SamplingParams(request_output_len=120, end_ids=(END,), min_length=120)
    with frontend_to(eight_heads, ranks=2) as frontend:
        old = ranks_of(frontend)
        began = threading.Event()
        for _ in range(4):
            frontend.submit([1, 2, 3], long, answers.put, lambda new: began.set(), stream=True)
        assert began.wait(60)
        os.kill(old[victim].pid, signal.SIGKILL)
        refused = [answers.get(timeout=30) for _ in range(4)]
        assert all(isinstance(answer, Failed) for answer in refused)
        _, alive = psutil.wait_procs(old, timeout=30)
        assert alive == []
        deadline = time.monotonic() + 100
        while True:
            with contextlib.suppress(UnavailableError):
                served = results(frontend, PROMPTS)
                break
            assert time.monotonic() < deadline, "no new engine came"
            time.sleep(0.05)
        assert frontend.engine_info.engine_pid != old[0].pid
        assert len(served) == len(PROMPTS) * len(REQUESTS)


def test_an_error_on_one_rank_stops_the_start_with_its_words(
    eight_heads: Path, write_fastertransformer: Callable[..., Path], tmp_path: Path
) -> None:
    files = write_fastertransformer(eight_heads, tmp_path / "1-gpu", 1)
    (files / "model.wte.bin").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"model\.wte\.bin has 5 bytes"), frontend_to(files, 2, context_length=128):
        pass
