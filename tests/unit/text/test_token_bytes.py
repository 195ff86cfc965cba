"""The bytes of the tokens add up to the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers

from gptj_triton.errors import ConfigError
from gptj_triton.text.token_bytes import TokenBytes, byte_alphabet, load_token_bytes

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def tokenizer(storyteller: Path) -> Tokenizer:
    return Tokenizer.from_file(str(storyteller / "tokenizer.json"))


@pytest.fixture(scope="module")
def token_bytes(storyteller: Path) -> list[bytes]:
    return load_token_bytes(storyteller / "tokenizer.json", 4096)


@given(text=TEXT)
def test_the_bytes_of_the_tokens_of_any_text_are_its_utf8(
    text: str, tokenizer: Tokenizer, token_bytes: list[bytes]
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    if not special.intersection(ids):
        assert b"".join(token_bytes[token] for token in ids) == text.encode()


def test_a_special_token_stands_for_no_bytes(tokenizer: Tokenizer, token_bytes: list[bytes]) -> None:
    assert token_bytes[4095] == b""
    assert tokenizer.id_to_token(4095) == "<|endoftext|>"


def test_a_special_token_is_spelt_out_in_a_prompt(storyteller: Path, token_bytes: list[bytes]) -> None:
    tokens = TokenBytes.read(storyteller / "tokenizer.json")
    assert tokens.spelt_out[4095] == b"<|endoftext|>"
    assert (tokens.spelt_out[:4095], tokens.new) == (token_bytes[:4095], token_bytes)


def test_the_alphabet_has_each_byte_once_and_is_that_of_tokenizers() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_token_outside_the_alphabet_stands_for_its_own_letters(tmp_path: Path) -> None:
    vocabulary = {"Ġking": 0, "日本": 1, "Ġ日": 2, "é": 3}
    decoder = decoders.ByteLevel()
    tokenizer = {"decoder": {"type": "ByteLevel"}, "model": {"vocab": vocabulary}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    table = load_token_bytes(tmp_path / "tokenizer.json", 4)
    assert table == [b" king", "日本".encode(), "Ġ日".encode(), b"\xe9"]
    for token, index in list(vocabulary.items())[:3]:
        assert table[index].decode() == decoder.decode([token])


def test_ids_beyond_the_tokenizer_stand_for_no_bytes_and_ids_beyond_the_model_are_left_out(storyteller: Path) -> None:
    assert load_token_bytes(storyteller / "tokenizer.json", 5000)[4096:] == [b""] * 904
    assert len(load_token_bytes(storyteller / "tokenizer.json", 100)) == 100


def test_without_a_byte_level_tokenizer_there_is_no_table(tmp_path: Path) -> None:
    assert load_token_bytes(None, 10) == []
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"decoder": {"type": "Metaspace"}, "model": {"vocab": {"a": 0}}}))
    assert load_token_bytes(tokenizer, 10) == []
    tokenizer.write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not JSON"):
        load_token_bytes(tokenizer, 10)
