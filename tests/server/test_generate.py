"""Promises of the ensemble as a whole: its text is the model's text, whoever else is being served."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoTokenizer, GPTJForCausalLM

from tests.server.conftest import Server

CHECKPOINT = Path(__file__).parents[2] / "model_repository" / "fastertransformer" / "1" / "storyteller"
NEW_TOKENS = 40
TALE = (
    "Once upon a time there was a miller who had three sons, and when he died he left them nothing but his mill, "
    "his ass and his cat. The eldest took the mill, the second the ass, and the youngest had only the cat. 'Ah,' said "
    "he, 'my brothers can earn an honest living, but I, when I have eaten my cat, must die of hunger.' "
)
PROMPT_CHARACTERS = (1, 4, 9, 30, 70, 150, 300, 900)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [(TALE * 3)[:length] for length in PROMPT_CHARACTERS]


@pytest.fixture(scope="module")
def expected(prompts: list[str]) -> list[str]:
    """transformers' greedy continuation of each prompt, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = GPTJForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def generate(server: Server, **fields: Any) -> dict[str, Any]:
    response = requests.post(f"http://{server.http_url}/v2/models/ensemble/generate", json=fields, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_greedy_text_is_that_of_transformers(server: Server, prompts: list[str], expected: list[str]) -> None:
    texts = [generate(server, text_input=prompt, max_tokens=NEW_TOKENS)["text_output"] for prompt in prompts]
    assert texts == expected


def test_greedy_text_is_the_same_with_sixteen_others_in_flight(
    server: Server, prompts: list[str], expected: list[str]
) -> None:
    def sampled(seed: int) -> dict[str, Any]:
        return generate(
            server, text_input=TALE[seed : 20 * seed + 30], max_tokens=100, min_tokens=100, top_p=0.9, seed=seed
        )

    with ThreadPoolExecutor(16 + len(prompts)) as pool:
        others = [pool.submit(sampled, seed) for seed in range(16)]
        texts = list(pool.map(lambda p: generate(server, text_input=p, max_tokens=NEW_TOKENS)["text_output"], prompts))
        assert [other.result()["sequence_length"] > 100 for other in others] == [True] * 16
    assert texts == expected


def test_a_seed_gives_the_same_text_again_and_no_seed_another(server: Server) -> None:
    request = {"text_input": "The old king", "max_tokens": 30, "temperature": 1.0}
    seeded = {generate(server, **request, seed=7)["text_output"] for _ in range(3)}
    unseeded = {generate(server, **request)["text_output"] for _ in range(3)}
    assert len(seeded) == 1 and len(unseeded) == 3


def test_text_ends_before_a_stop_string_however_its_tokens_merge(server: Server) -> None:
    whole = generate(server, text_input="Once upon a time", max_tokens=60)["text_output"]
    stop = whole[23:29]
    answer = generate(server, text_input="Once upon a time", max_tokens=60, stop_words=[stop])
    assert answer["finish_reason"] == "stop"
    assert answer["text_output"] == whole[: whole.index(stop)]


def test_beams_come_best_first_and_the_best_is_no_worse_than_greedy(server: Server) -> None:
    request = {"text_input": "The wolf", "max_tokens": 12, "return_log_probs": True}
    beams = generate(server, **request, beam_width=4)
    assert len(set(beams["text_output"])) == 4
    assert beams["cum_log_probs"] == sorted(beams["cum_log_probs"], reverse=True)
    assert beams["cum_log_probs"][0] >= generate(server, **request)["cum_log_probs"]


def test_several_sequences_of_one_prompt_differ_and_each_has_its_log_probs(server: Server) -> None:
    answer = generate(
        server, text_input="The wolf", max_tokens=12, top_k=40, seed=1, num_return_sequences=3, return_log_probs=True
    )
    assert len(set(answer["text_output"])) == 3
    assert len(answer["cum_log_probs"]) == 3 and len(answer["output_log_probs"]) == 36
    assert answer["cum_log_probs"][0] == pytest.approx(sum(answer["output_log_probs"][:12]), rel=1e-4)


def test_fastertransformers_own_files_give_the_same_text(
    server: Server, launch: Callable[..., Server], tmp_path: Path
) -> None:
    """As NVIDIA's converter leaves them: without config.json and tokenizer."""
    files = tmp_path / "2-gpu"
    convert = [sys.executable, "tools/convert_checkpoint.py", str(CHECKPOINT), str(files), "--to", "fastertransformer"]
    subprocess.run([*convert, "--tensor-para-size", "2"], cwd=CHECKPOINT.parents[3], check=True, capture_output=True)
    for path in files.iterdir():
        if path.suffix not in (".bin", ".ini"):
            path.unlink()
    model = ["--model", str(files), "--tokenizer", str(CHECKPOINT), "--context-length", "1024"]
    other = launch(*model, "--", "--exit-timeout-secs=2").wait_until_ready()
    request = {"text_input": "Once upon a time", "max_tokens": 40, "stop_words": ["sad"]}
    assert generate(other, **request)["text_output"] == generate(server, **request)["text_output"]
