"""Tokens become the text that a user expects: exact to the byte, cut where it should end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gptj_triton.text.detokenizer import Detokenizer, Piece, without_cut_character

END = 299
PROMPT = "Once upon a time"
TEXTS = st.text() | st.sampled_from(
    ["there was a tailor", "\U0001f600 שלום עולם\n\n", "  two  spaces ", "a\x00\x1b[0m\r\n"]
)


@pytest.fixture(scope="module")
def tokenizer(toy_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(toy_checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module")
def detokenizer(toy_checkpoint: Path) -> Detokenizer:
    return Detokenizer.load(toy_checkpoint)


def finish(
    detokenizer: Detokenizer,
    ids: list[int],
    prompt_length: int,
    end_id: int,
    stop_words: list[bytes] | tuple[()] = (),
    reason: str | None = None,
    with_prompt: bool = False,
) -> Piece:
    """All of a sequence in one response; `reason`: the engine's finish reason, None where it gives none."""
    return detokenizer.piece(ids, prompt_length, prompt_length, [end_id], stop_words, reason or "length", with_prompt)


def plain(text: str) -> bool:
    return "<|endoftext|>" not in text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_decoding_gives_back_the_bytes_that_were_encoded(
    detokenizer: Detokenizer, tokenizer: Tokenizer, text: str
) -> None:
    assert detokenizer.prompt_bytes(tokenizer.encode(text).ids) == text.encode()


def test_every_single_byte_survives(detokenizer: Detokenizer) -> None:
    assert {data for data in detokenizer.prompt_table if len(data) == 1} == {bytes([byte]) for byte in range(256)}


def test_valid_text_decodes_as_the_tokenizer_itself_decodes_it(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("There was a tailor: été, 東京.").ids
    assert detokenizer.new_bytes(ids).decode() == tokenizer.decode(ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS.filter(plain), data=st.data())
def test_text_cut_after_any_token_is_a_prefix_of_the_whole(
    detokenizer: Detokenizer, tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = tokenizer.encode(text).ids
    kept = data.draw(st.integers(0, len(ids)))
    assert text.startswith(finish(detokenizer, ids[:kept], 0, END).text)


def test_a_character_cut_in_the_middle_is_left_out_and_other_bad_bytes_are_marked() -> None:
    assert without_cut_character("a\U0001f600".encode()[:-1]) == "a"
    assert without_cut_character(b"a\xffb") == "a\ufffdb"
    assert without_cut_character(b"\xe2\x82b") == "\ufffdb"


def test_only_the_new_text_is_returned_unless_asked(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    prompt, new = tokenizer.encode(PROMPT).ids, tokenizer.encode(" there was").ids
    assert finish(detokenizer, [*prompt, *new], len(prompt), END).text == " there was"
    assert finish(detokenizer, [*prompt, *new], len(prompt), END, with_prompt=True).text == PROMPT + " there was"


def test_the_prompt_comes_back_as_it_was_sent_special_tokens_included(
    detokenizer: Detokenizer, tokenizer: Tokenizer
) -> None:
    text = "one<|endoftext|>two"
    prompt, new = tokenizer.encode(text).ids, tokenizer.encode("!").ids
    assert finish(detokenizer, [*prompt, *new], len(prompt), END, with_prompt=True).text == text + "!"


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_the_end_id_and_what_pads_behind_it_are_dropped(
    detokenizer: Detokenizer, tokenizer: Tokenizer, padding: int
) -> None:
    new = tokenizer.encode("The end").ids
    finished = finish(detokenizer, [*new, END, *[END] * padding], 0, END)
    assert (finished.text, finished.finish_reason, finished.num_output_tokens) == ("The end", "stop", len(new) + 1)


def test_a_users_own_end_id_ends_the_text_though_it_has_letters(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    (newline,) = tokenizer.encode("\n").ids
    assert finish(detokenizer, tokenizer.encode("one\ntwo").ids, 0, newline).text == "one"


def test_the_first_of_several_end_ids_ends_the_text(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    newline, comma = tokenizer.encode("\n,").ids
    ids = tokenizer.encode("one,two\nthree").ids
    for end_ids, text in (([newline, comma], "one"), ([newline, END, -1], "one,two"), ([-1], "one,two\nthree")):
        piece = detokenizer.piece(ids, 0, 0, end_ids, (), "length")
        assert (piece.text, piece.finish_reason) == (text, "length" if end_ids == [-1] else "stop")


def test_an_end_id_in_the_prompt_ends_nothing(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    new = tokenizer.encode("go on").ids
    finished = finish(detokenizer, [END, *new], 1, END)
    assert (finished.text, finished.finish_reason) == ("go on", "length")


def test_special_tokens_that_do_not_end_the_text_stand_for_none(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    new = [*tokenizer.encode("a").ids, END, *tokenizer.encode("b").ids]
    assert finish(detokenizer, new, 0, 0).text == "ab"


def test_an_added_token_stands_for_its_own_letters(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens(["two €"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert finish(Detokenizer.load(tmp_path), tokenizer.encode("It is two €.").ids, 0, END).text == "It is two €."


def test_an_id_that_only_the_model_has_stands_for_no_text(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    assert finish(detokenizer, [*tokenizer.encode("a").ids, 303], 0, END).text == "a"


@pytest.mark.parametrize(
    ("stop_words", "text"),
    [
        ([b"."], "He went home"),
        ([b"slept", b"home"], "He went "),
        ([b"home", b"slept"], "He went "),
        ([b"ome. H"], "He went h"),
        ([b"He"], ""),
        (["é".encode()], "He went home. He slept. "),
    ],
)
def test_the_text_is_cut_at_the_first_stop_word(
    detokenizer: Detokenizer, tokenizer: Tokenizer, stop_words: list[bytes], text: str
) -> None:
    finished = finish(detokenizer, tokenizer.encode("He went home. He slept. é").ids, 0, END, stop_words, "length")
    assert (finished.text, finished.finish_reason) == (text, "stop")


def test_a_stop_word_cuts_the_new_text_behind_a_whole_prompt(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    prompt, new = tokenizer.encode(PROMPT).ids, tokenizer.encode(" there was").ids
    assert finish(detokenizer, [*prompt, *new], len(prompt), END, [b"was"], with_prompt=True).text == PROMPT + " there "


def test_a_stop_word_in_the_prompt_or_across_its_end_cuts_nothing(
    detokenizer: Detokenizer, tokenizer: Tokenizer
) -> None:
    prompt, new = tokenizer.encode(PROMPT).ids, tokenizer.encode(" there was").ids
    stop_words = [b"upon", b"time there"]
    finished = finish(detokenizer, [*prompt, *new], len(prompt), END, stop_words, with_prompt=True)
    assert (finished.text, finished.finish_reason) == (PROMPT + " there was", "length")


def test_the_engines_reason_is_kept_and_an_absent_one_is_length(detokenizer: Detokenizer, tokenizer: Tokenizer) -> None:
    new = tokenizer.encode("a").ids
    assert [
        finish(detokenizer, new, 0, END, (), reason).finish_reason for reason in ("stop", "length", "timeout", None)
    ] == [
        "stop",
        "length",
        "timeout",
        "length",
    ]


def test_a_tokenizer_that_is_not_byte_level_stops_the_load(toy_checkpoint: Path, tmp_path: Path) -> None:
    description = json.loads((toy_checkpoint / "tokenizer.json").read_text())
    description["decoder"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="the decoder is None; it must be ByteLevel"):
        Detokenizer.load(tmp_path)


def test_a_missing_tokenizer_stops_the_load_with_its_name(toy_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(toy_checkpoint / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Detokenizer.load(tmp_path)
