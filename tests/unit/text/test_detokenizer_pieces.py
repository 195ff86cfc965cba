"""The pieces of a stream joined are the whole text, however it is cut: no broken character, no part of a stop word."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gptj_triton.project import EMBEDDED_MODEL
from gptj_triton.text.detokenizer import Detokenizer, without_cut_character
from gptj_triton.text.token_bytes import byte_alphabet

NASTY = {
    "emoji joined by ZWJ": "👩‍👩‍👧‍👦 🏴‍☠️ 👍🏽🇩🇪",
    "CJK": "昔々あるところに、おじいさんと老婆がいました。東京",
    "combining marks": "Ångström e\u0301tude ŏ̈ नमस्ते",
    "spaces": "  two  spaces \n\n\tand  a tab ",
    "added tokens": "It is two €. <|robot|> says 🤖 hello<|pad|>",
    "right to left": "שלום עולם \u200fabc",
    "repetition": "aaab aaabaab aab",
}
STOP_WORDS: list[list[bytes]] = [
    [],
    [b"aab"],
    [b"aab", b"b a"],
    ["👧".encode()],
    ["👧".encode()[1:3]],
    ["。".encode(), b"\n\n", b"."],
    ["々あるところに、お".encode()],
    [b"\x81\x82", b"\x80"],
    [b"e two", b" two spaces", b" says"],
]


def train(directory: Path, vocab_size: int, add_prefix_space: bool) -> Path:
    """A byte-level tokenizer whose tokens end inside characters, with special tokens and added ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=add_prefix_space, use_regex=not add_prefix_space
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*NASTY.values()] * 2, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    tokenizer.add_tokens(["two €", "🤖", AddedToken("<|robot|>", lstrip=True, rstrip=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module", params=["storyteller", "toy", "many merges", "prefix space"])
def checkpoint(request: pytest.FixtureRequest, toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "storyteller":
        return EMBEDDED_MODEL
    directory = tmp_path_factory.mktemp("tokenizer")
    if request.param == "toy":
        shutil.copy(toy_checkpoint / "tokenizer.json", directory)
        return directory
    return train(directory, 450, add_prefix_space=request.param == "prefix space")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module")
def detokenizer(checkpoint: Path) -> Detokenizer:
    return Detokenizer.load(checkpoint)


@pytest.fixture(scope="module")
def end(tokenizer: Tokenizer) -> int:
    return id_of(tokenizer, "<|endoftext|>")


def id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return int(found)


def whole_text(detokenizer: Detokenizer, new: Sequence[int], end: int, stop_words: Sequence[bytes]) -> str:
    """The text of new tokens, byte after byte: it ends when a stop word is complete."""
    data = b""
    for byte in detokenizer.new_bytes(new[: new.index(end)] if end in new else new):
        data += bytes([byte])
        if complete := [word for word in stop_words if data.endswith(word)]:
            data = data[: -max(map(len, complete))]
            break
    return without_cut_character(data)


def ids_of_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    return [id_of(tokenizer, letters[byte]) for byte in data]


def num_until_stop(detokenizer: Detokenizer, new: Sequence[int], end: int, stop_words: Sequence[bytes]) -> int:
    """After how many new tokens an engine ends a sequence because of a stop word: no response that goes on has more."""
    for count in range(1, len(new) + 1):
        data = detokenizer.new_bytes(new[:count])
        if end in new[:count]:
            break
        if any(word in data for word in stop_words):
            return count
    return len(new)


def pieces(
    detokenizer: Detokenizer,
    ids: Sequence[int],
    cuts: Sequence[int],
    prompt_length: int,
    end: int,
    stop_words: Sequence[bytes],
    with_prompt: bool = False,
) -> list[str]:
    """The text of each response; `cuts`: how many tokens the responses before the last have had."""
    lengths = [prompt_length, *sorted(cuts), len(ids)]
    found = []
    for number, (previous, length) in enumerate(pairwise(lengths)):
        reason = "length" if number == len(cuts) else ""
        piece = detokenizer.piece(ids[:length], prompt_length, previous, [end], stop_words, reason, with_prompt)
        assert bool(piece.finish_reason) == bool(reason)
        found.append(piece.text)
    return found


@pytest.mark.parametrize("stop_words", STOP_WORDS, ids=repr)
@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_pieces_cut_at_any_two_positions_are_the_whole_text(
    detokenizer: Detokenizer, tokenizer: Tokenizer, end: int, text: str, stop_words: list[bytes]
) -> None:
    """A piece depends on where it begins and ends alone, so any two positions are any way of cutting.

    Tokens behind a stop word come with those that complete it, or in the response after that, but not later.
    """
    ids = [*tokenizer.encode(text).ids, end, end]
    whole = whole_text(detokenizer, ids, end, stop_words)
    assert detokenizer.piece(ids, 0, 0, [end], stop_words, "length").text == whole
    shown = [detokenizer.piece(ids[:length], 0, 0, [end], stop_words).text for length in range(len(ids) + 1)]
    assert "\ufffd" not in whole
    assert all(whole.startswith(text) for text in shown)
    for first in range(num_until_stop(detokenizer, ids, end, stop_words) + 1):
        rest = detokenizer.piece(ids, 0, first, [end], stop_words, "length")
        assert shown[first] + rest.text == whole
        for second in range(first, len(ids) + 1):
            assert shown[first] + detokenizer.piece(ids[:second], 0, first, [end], stop_words).text == shown[second]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_of_any_tokens_are_the_whole_text(
    detokenizer: Detokenizer, tokenizer: Tokenizer, end: int, data: st.DataObject
) -> None:
    """Also where tokens go on behind a stop word or the end id, bytes are no UTF-8, the prompt ends in a character."""
    texts = st.text(max_size=12) | st.sampled_from(list(NASTY.values()))
    encoded = texts.map(lambda text: [int(index) for index in tokenizer.encode(text).ids])
    some_ids = encoded | st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=12)
    prompt, new = data.draw(some_ids), data.draw(st.lists(some_ids, max_size=3).map(lambda lists: [*chain(*lists)]))
    raw = detokenizer.new_bytes(new)
    places = st.tuples(st.integers(0, len(raw)), st.integers(1, 6))
    cut_out = places.map(lambda place: raw[place[0] : place[0] + place[1]])
    stop_words = data.draw(st.lists((cut_out | st.binary(min_size=1, max_size=3)).filter(bool), max_size=3))
    last_cut = len(prompt) + num_until_stop(detokenizer, new, end, stop_words)
    cuts = data.draw(st.lists(st.integers(len(prompt), last_cut), max_size=6))
    with_prompt = data.draw(st.booleans())
    ids = [*prompt, *new]
    whole = detokenizer.piece(ids, len(prompt), len(prompt), [end], stop_words, "length", with_prompt).text
    if not with_prompt:
        assert whole == whole_text(detokenizer, new, end, stop_words)
    assert "".join(pieces(detokenizer, ids, cuts, len(prompt), end, stop_words, with_prompt)) == whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), data=st.data())
def test_what_is_whole_is_shown_at_once(
    detokenizer: Detokenizer, tokenizer: Tokenizer, end: int, text: str, data: st.DataObject
) -> None:
    ids = tokenizer.encode(text).ids
    kept = data.draw(st.integers(0, len(ids)))
    shown = detokenizer.piece(ids[:kept], 0, 0, [end], [b"\xff\xff"]).text
    assert shown == without_cut_character(detokenizer.new_bytes(ids[:kept]))


def test_only_what_may_become_a_stop_word_waits(detokenizer: Detokenizer, tokenizer: Tokenizer, end: int) -> None:
    ids = [id_of(tokenizer, letter) for letter in "aaabc"]
    shown = [detokenizer.piece(ids[:length], 0, 0, [end], [b"aabd"]).text for length in range(1, 6)]
    assert shown == ["", "", "a", "a", "aaabc"]
    assert detokenizer.piece(ids[:4], 0, 3, [end], [b"aabd"], "length").text == "aab"


def test_a_stop_word_that_is_complete_ends_the_text_whatever_follows(
    detokenizer: Detokenizer, tokenizer: Tokenizer, end: int
) -> None:
    ids = [id_of(tokenizer, letter) for letter in "xabcd"]
    stop_words = [b"abcd", b"bc"]
    assert pieces(detokenizer, ids, [1, 2, 3, 4], 0, end, stop_words) == ["x", "", "", "a", ""]
    assert detokenizer.piece(ids, 0, 0, [end], stop_words, "length").text == "xa"


def test_the_prompt_comes_once_with_the_first_new_token(
    detokenizer: Detokenizer, tokenizer: Tokenizer, end: int
) -> None:
    prompt, new = tokenizer.encode("Once upon").ids, [id_of(tokenizer, letter) for letter in "ab"]
    length = len(prompt)
    asked = detokenizer.prompt_bytes(prompt).decode()
    cuts = [length, length, length + 1]
    assert pieces(detokenizer, [*prompt, *new], cuts, length, end, [], with_prompt=True) == ["", "", asked + "a", "b"]
    assert pieces(detokenizer, prompt, [length], length, end, [], with_prompt=True) == ["", asked]


def test_a_character_that_begins_in_the_prompt_is_shown_once_it_is_whole(
    detokenizer: Detokenizer, tokenizer: Tokenizer, end: int
) -> None:
    ids = ids_of_bytes(tokenizer, "x😀a".encode())
    shown = [detokenizer.piece(ids[:length], 3, length - 1, [end], with_prompt=True).text for length in range(4, 7)]
    assert shown == ["x", "😀", "a"]


def test_a_special_token_behind_what_is_held_back_changes_nothing(
    detokenizer: Detokenizer, tokenizer: Tokenizer, end: int
) -> None:
    ids = [*ids_of_bytes(tokenizer, "😀ab".encode()), end, *ids_of_bytes(tokenizer, b"c")]
    other_end, held_back = 10**6, "😀ab".encode()[3:] + b"X"
    shown = [detokenizer.piece(ids[:length], 0, length - 1, [other_end], [held_back]).text for length in range(1, 9)]
    assert shown == ["", "", "", "", "", "", "", "😀abc"]


def test_a_reason_is_given_once_and_is_that_of_the_whole(
    detokenizer: Detokenizer, tokenizer: Tokenizer, end: int
) -> None:
    ids = [*tokenizer.encode("one. two").ids, end]
    reasons = [detokenizer.piece(ids[:k], 0, k - 1, [end]).finish_reason for k in range(1, len(ids) + 1)]
    assert set(reasons) == {""}
    assert detokenizer.piece(ids, 0, 1, [end], (), "length").finish_reason == "stop"
    assert detokenizer.piece(ids[:-1], 0, 1, [end], (b".",), "timeout").finish_reason == "stop"
    assert detokenizer.piece(ids[:-1], 0, 1, [end], (), "timeout").finish_reason == "timeout"


def test_each_token_is_counted_once_and_the_end_once(detokenizer: Detokenizer, tokenizer: Tokenizer, end: int) -> None:
    prompt, new = tokenizer.encode("Once").ids, tokenizer.encode("one. two").ids
    ids = [*prompt, *new, end, end]
    assert detokenizer.piece(ids, len(prompt), len(prompt), [end], (), "stop").num_output_tokens == len(new) + 1
    for step in (1, 2, 3):
        cuts = [*range(len(prompt), len(ids), step), len(ids)]
        counts = [
            detokenizer.piece(ids[:now], len(prompt), before, [end]).num_output_tokens for before, now in pairwise(cuts)
        ]
        assert sum(counts) == len(new) + 1
        assert counts[0] == step


def test_letters_outside_the_alphabet_mean_themselves(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "€": 1, "<unk>": 2}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Detokenizer.load(tmp_path).new_bytes([0, 1, 2]).decode() == "a€<unk>"
