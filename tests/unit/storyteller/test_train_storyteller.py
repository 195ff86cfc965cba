"""Promises of tools/train_storyteller.py, kept by one tiny training run of the real script."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptj_triton.storyteller import train as train_storyteller
from gptj_triton.storyteller.corpus import END_OF_TEXT, hold_out, read_corpus
from gptj_triton.storyteller.training import use_fused_attention

TINY = [
    *("--context", "128", "--width", "16", "--layers", "1", "--heads", "2", "--rotary-dim", "4"),
    *("--vocab-size", "320", "--batch-size", "4", "--steps", "6"),
]


def tale(number: int) -> str:
    words = ["king", "fox", "forest", "gold", "daughter", "went", "said", "old", "river", "bread", "and", "the"]
    draw = random.Random(number)
    lines = [" ".join(draw.choices(words, k=12)) + "." for _ in range(6)]
    return "\n".join(["Once upon a time there was a miller.", *lines])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "tales.txt"
    books = ["\n".join(tale(10 * book + number) for number in range(10)) for book in range(3)]
    path.write_text("\n\n".join(books), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "storyteller"
    train_storyteller.main(["--corpus", str(corpus), "--out", str(out), "--device", "cpu", *TINY])
    return out


def test_transformers_loads_what_was_trained(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    drawn = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert type(model).__name__ == "GPTJForCausalLM"
    assert tokenizer.decode(drawn[0]).startswith("Once upon a time")


def test_end_of_text_is_the_last_id_and_the_config_agrees(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    last = config["vocab_size"] - 1
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == last == len(tokenizer) - 1
    assert config["bos_token_id"] == config["eos_token_id"] == last


def test_weights_are_saved_as_fp16(checkpoint: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


@given(text=st.text())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_round_trips_through_the_tokenizer(checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_card_reports_the_losses_and_ten_samples(checkpoint: Path) -> None:
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert card.count("\nSeed ") == 10
    assert "| held out | " in card
    assert (checkpoint / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_held_out_tenth_is_disjoint_and_spread_over_the_books(corpus: Path) -> None:
    paragraphs = read_corpus(corpus)
    training, held_out = hold_out(paragraphs, seed=0)
    third = len(paragraphs) // 3
    assert sorted(training + held_out) == sorted(paragraphs)
    assert 0.05 < sum(map(len, held_out)) / sum(map(len, paragraphs)) < 0.15
    assert all(any(text in paragraphs[i * third : (i + 1) * third] for text in held_out) for i in range(3))


def test_a_tale_ends_where_the_next_one_opens(corpus: Path) -> None:
    paragraphs = read_corpus(corpus)
    assert sum(text.endswith(END_OF_TEXT) for text in paragraphs) == 30


def test_the_fused_attention_of_training_is_gptj_s_own(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20)
    expected = model(ids).logits
    use_fused_attention(model)
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe", b"too short"])
def test_a_corpus_that_cannot_be_used_is_refused_in_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as refusal:
        train_storyteller.main(["--corpus", str(path), "--out", str(tmp_path / "out"), "--device", "cpu", *TINY])
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_context_too_short_for_the_samples_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--context 64: at least 128"):
        train_storyteller.main(["--corpus", str(corpus), "--out", str(tmp_path / "out"), "--context", "64"])
