"""Stop words, stop strings and bad words of a sequence mean what comparing each with the tokens would say."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence

TOKEN_BYTES = [b"a", b"b", b"ab", b"", b"ba", b"~"]
TOKENS = st.integers(0, 4)
WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), max_size=6).map(tuple)
STRINGS = st.lists(st.text("ab", min_size=1, max_size=5).map(str.encode), max_size=4).map(tuple)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(request_output_len=1000, end_ids=(5,), **fields)


def ends_with(tokens: list[int], word: tuple[int, ...]) -> bool:
    return len(tokens) >= len(word) and tuple(tokens[len(tokens) - len(word) :]) == word


@given(stop_words=WORDS, stop_strings=STRINGS, tokens=st.lists(TOKENS, max_size=12), copied=st.integers(0, 12))
def test_a_sequence_and_its_copy_end_with_the_first_token_that_completes_a_stop(
    stop_words: tuple[tuple[int, ...], ...], stop_strings: tuple[bytes, ...], tokens: list[int], copied: int
) -> None:
    sequence = Sequence(0, [0, 1, 2], params(stop_words_list=stop_words, stop_strings=stop_strings))
    for count, token in enumerate(tokens):
        if count == copied:
            other = sequence.copy()
            other.append(5, 0.0, TOKEN_BYTES)  # what becomes of a copy does not change the sequence, nor the reverse
            sequence = sequence.copy()
        sequence.append(token, 0.0, TOKEN_BYTES)
        text = b"".join(TOKEN_BYTES[each] for each in sequence.output)
        stops = any(ends_with(sequence.output, word) for word in stop_words) or any(s in text for s in stop_strings)
        assert sequence.finish_reason == ("stop" if stops else None)
        if stops:
            break


@given(words=WORDS, prompt=st.lists(TOKENS, min_size=1, max_size=4), output=st.lists(TOKENS, max_size=4))
def test_the_tokens_are_banned_that_would_complete_a_bad_word_of_prompt_and_output(
    words: tuple[tuple[int, ...], ...], prompt: list[int], output: list[int]
) -> None:
    sequence = Sequence(0, prompt, params(bad_words_list=words, min_length=3), output)
    expected = {word[-1] for word in words if ends_with([*prompt, *output], word[:-1])}
    assert set(sequence.banned_tokens()) == expected | ({5} if len(output) < 3 else set())


def test_a_copy_has_the_tokens_but_no_pages() -> None:
    sequence = Sequence(0, [1, 2], params(), [3], [-0.5], [7], [b"key"], num_cached=2, num_shared=1, in_flight=1)
    copy = sequence.copy()
    assert (copy.output, copy.log_probs, copy.page_keys, copy.group) == ([3], [-0.5], [b"key"], [copy])
    assert (copy.pages, copy.num_cached, copy.num_shared, copy.in_flight) == ([], 0, 0, 0)
    copy.output.append(4)
    assert (sequence.output, sequence.pages, sequence.group) == ([3], [7], [sequence])
