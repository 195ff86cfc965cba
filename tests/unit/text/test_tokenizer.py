"""Text becomes the tokens that the tokenizer gives, in the tensors that FasterTransformer expects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

from gptj_triton.errors import ConfigError
from gptj_triton.text.tokenizer import PromptTokenizer
from gptj_triton.triton.token_tensors import column, pad_right, seeds, word_lists


@pytest.fixture(scope="module")
def prompts(toy_checkpoint: Path) -> PromptTokenizer:
    return PromptTokenizer.load(toy_checkpoint)


def test_the_limits_come_from_the_checkpoints_config(prompts: PromptTokenizer) -> None:
    assert (prompts.context_length, prompts.vocab_size, prompts.end_ids) == (64, 304, (299,))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1) | st.sampled_from(["time " * 50, "<|endoftext|>" * 3, "\U0001f600שלום\x00\x1b"]))
def test_no_text_has_fewer_tokens_than_the_longest_token_allows(prompts: PromptTokenizer, text: str) -> None:
    assert prompts.longest_token is not None
    assert len(prompts.encode(text)) * prompts.longest_token >= len(text.encode())


def test_the_longest_token_is_measured_in_bytes(prompts: PromptTokenizer, toy_checkpoint: Path, tmp_path: Path) -> None:
    assert prompts.longest_token == len(b"<|endoftext|>")
    shutil.copy(toy_checkpoint / "config.json", tmp_path)
    tokenizer = Tokenizer.from_file(str(toy_checkpoint / "tokenizer.json"))
    tokenizer.add_tokens(["€" * 10])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert PromptTokenizer.load(tmp_path).longest_token == len(("€" * 10).encode())


def test_a_tokenizer_that_swallows_text_has_no_longest_token(toy_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(toy_checkpoint / "config.json", tmp_path)
    tokenizer = Tokenizer.from_file(str(toy_checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<gap>", lstrip=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert PromptTokenizer.load(tmp_path).longest_token is None
    tokenizer = Tokenizer.from_file(str(toy_checkpoint / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert PromptTokenizer.load(tmp_path).longest_token is None


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(toy_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(toy_checkpoint / "config.json", tmp_path)
    tokenizer = Tokenizer.from_file(str(toy_checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a tailor who had three sons"
    assert PromptTokenizer.load(tmp_path).encode(text) == PromptTokenizer.load(toy_checkpoint).encode(text)
    assert PromptTokenizer.load(tmp_path).encode("a") == PromptTokenizer.load(toy_checkpoint).encode("a")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_missing_file_stops_the_load_with_its_name(toy_checkpoint: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(toy_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / name} is missing"):
        PromptTokenizer.load(tmp_path)


@pytest.mark.parametrize("key", ["n_positions", "vocab_size"])
def test_a_config_without_a_number_stops_the_load_with_its_key(toy_checkpoint: Path, tmp_path: Path, key: str) -> None:
    shutil.copytree(toy_checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: {key} is None; it must be a whole number"):
        PromptTokenizer.load(tmp_path)


def test_a_word_is_spelt_both_at_the_start_of_a_text_and_behind_a_space(prompts: PromptTokenizer) -> None:
    assert prompts.word_sequences(("time",)) == [prompts.encode("time"), prompts.encode(" time")]
    assert prompts.encode(" time") != [*prompts.encode(" "), *prompts.encode("time")]


def test_a_word_that_begins_with_a_space_gets_no_second_one(prompts: PromptTokenizer) -> None:
    assert prompts.word_sequences((" time",)) == [prompts.encode(" time")]


def test_a_word_has_both_spellings_where_the_tokenizer_puts_a_space_before_a_text(
    prompts: PromptTokenizer, toy_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(toy_checkpoint / "config.json", tmp_path)
    raw = json.loads((toy_checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    raw["pre_tokenizer"]["add_prefix_space"] = True
    for pre_tokenizer in (raw["pre_tokenizer"], {"type": "Sequence", "pretokenizers": [raw["pre_tokenizer"]]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"pre_tokenizer": pre_tokenizer}))
        prefixing = PromptTokenizer.load(tmp_path)
        assert prefixing.encode("time") == prompts.encode(" time")
        assert prefixing.word_sequences(("time",)) == prompts.word_sequences(("time",))


def test_a_spelling_that_two_words_share_is_listed_once(prompts: PromptTokenizer) -> None:
    assert prompts.word_sequences(("time", " time", "time")) == [prompts.encode("time"), prompts.encode(" time")]


def test_words_that_need_tokens_beyond_the_vocabulary_are_left_out(toy_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(toy_checkpoint / "config.json", tmp_path)
    tokenizer = Tokenizer.from_file(str(toy_checkpoint / "tokenizer.json"))
    tokenizer.add_tokens([f"<{number}>" for number in range(10)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompts = PromptTokenizer.load(tmp_path)
    assert max(prompts.encode("a<9>")) == 309 >= prompts.vocab_size
    assert prompts.word_sequences(("<9>", "time")) == prompts.word_sequences(("time",))


def test_special_tokens_are_text_where_the_settings_say_so(toy_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_checkpoint, tmp_path, dirs_exist_ok=True)
    assert PromptTokenizer.load(tmp_path).encode("<|endoftext|>") == [299]
    (tmp_path / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
    assert len(PromptTokenizer.load(tmp_path).encode("<|endoftext|>")) > 1


def test_word_lists_follow_fastertransformers_layout() -> None:
    lists = word_lists([[[7, 8], [9]], [[1]]])
    assert lists.dtype == np.int32
    assert lists.tolist() == [[[7, 8, 9], [2, 3, -1]], [[1, 0, 0], [1, -1, -1]]]


def test_no_words_are_fastertransformers_empty_list() -> None:
    assert word_lists([[]]).tolist() == [[[0], [-1]]]
    assert word_lists([[], [[5, 6]]]).tolist() == [[[0, 0], [-1, -1]], [[5, 6], [2, -1]]]


def test_prompts_are_padded_on_the_right_with_their_rows_own_end_id() -> None:
    ids = pad_right([[1, 2, 3], [4]], [98, 99])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [[1, 2, 3], [4, 99, 99]]


def test_a_column_has_one_value_a_row() -> None:
    assert column([3, 4], np.uint32).tolist() == [[3], [4]]


def test_rows_without_a_seed_draw_different_ones_and_given_seeds_stay() -> None:
    drawn = seeds([None, None, 2**64 - 1, 0])
    assert drawn.dtype == np.uint64
    assert drawn.shape == (4, 1)
    assert drawn[2:, 0].tolist() == [2**64 - 1, 0]
    assert len({*drawn[:2, 0].tolist(), *seeds([None, None])[:, 0].tolist()}) == 4


def test_a_directory_that_is_not_there_and_a_git_lfs_pointer_are_called_that(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent is no directory; tokenizer_dir must name one"):
        PromptTokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is a Git LFS pointer"):
        PromptTokenizer.load(tmp_path)


def test_a_text_of_far_too_many_tokens_is_known_by_its_beginning(prompts: PromptTokenizer) -> None:
    letters = "zq" * 4000
    assert len(prompts.encode(letters)) > 2 * 63
    assert prompts.surely_exceeds(letters, 63)
    assert not prompts.surely_exceeds("zq" * 200, 63)  # so short a text is encoded anyway


@given(text=st.text(max_size=40), times=st.integers(1, 40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_that_fits_is_taken_for_too_long(prompts: PromptTokenizer, text: str, times: int) -> None:
    repeated = text * times
    assert not prompts.surely_exceeds(repeated, max(1, len(prompts.encode(repeated))))
