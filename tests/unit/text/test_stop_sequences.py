"""The first stop sequence of a text is found however the text arrives, and what may become one is known."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gptj_triton.text.compile_cache import CompileCache
from gptj_triton.text.stop_sequences import StopSequences

# Few letters, so that words overlap, contain each other and repeat themselves.
WORDS = st.lists(st.text("ab", max_size=6).map(str.encode), max_size=6)
TEXTS = st.text("abc", max_size=24).map(str.encode)


def first_stop(text: bytes, words: Sequence[bytes]) -> tuple[int, int] | None:
    """Where the stop word begins and ends that is the first to be complete; of those that end there, the longest."""
    found = [(at + len(word), at) for word in words if word and (at := text.find(word)) >= 0]
    return min(found)[::-1] if found else None


def held_back(text: bytes, words: Sequence[bytes]) -> int:
    """The size of the longest end of `text` that is the beginning of a stop word."""
    return max(size for size in range(len(text) + 1) if not size or any(w.startswith(text[-size:]) for w in words))


@given(words=WORDS, text=TEXTS, data=st.data())
def test_the_first_complete_stop_word_is_found_however_the_text_is_cut(
    words: list[bytes], text: bytes, data: st.DataObject
) -> None:
    stops = StopSequences(words)
    state, read = stops.start, 0
    while read < len(text) and not state.complete:
        part = text[read : read + data.draw(st.integers(0, 5))]
        state, more = stops.feed(state, part)
        read += more
    found = first_stop(text, words)
    assert (found is None) == (state.complete == 0)
    if found:
        assert (read - state.complete, read) == found
    else:
        assert state.depth == held_back(text, words)


@given(words=WORDS, texts=st.lists(TEXTS, max_size=4))
def test_token_ids_are_found_as_bytes_are_and_texts_do_not_disturb_each_other(
    words: list[bytes], texts: list[bytes]
) -> None:
    as_bytes, as_tokens = StopSequences(words), StopSequences([tuple(word) for word in words])
    for text in texts:
        state, read = as_bytes.feed(as_bytes.start, text)
        same, read_tokens = as_tokens.feed(as_tokens.start, tuple(text))
        assert (state.complete, state.depth, read) == (same.complete, same.depth, read_tokens)
        assert (state.complete > 0) == (first_stop(text, words) is not None)


def test_a_stop_word_far_longer_than_pythons_stack_is_found_and_given_up() -> None:
    stops = StopSequences([b"a" * 20000 + b"b"])
    state, _ = stops.feed(stops.start, b"a" * 20000)
    assert (state.depth, state.complete) == (20000, 0)
    assert stops.feed(state, b"c")[0].depth == 0
    assert stops.feed(state, b"b")[0].complete == 20001


def test_a_hundred_thousand_stop_words_cost_hardly_more_than_one() -> None:
    text = bytes(range(97, 117)) * 500
    began = time.perf_counter()
    many = StopSequences([b"%d hundred" % number for number in range(100_000)])
    compiled = time.perf_counter() - began
    seconds = []
    for stops in (StopSequences([b"1 hundred"]), many):
        stops.feed(stops.start, text)
        began = time.perf_counter()
        stops.feed(stops.start, text)
        seconds.append(time.perf_counter() - began)
    assert compiled < 2.0  # the comparisons of all pairs would take minutes
    assert seconds[1] < 5 * seconds[0] + 0.01


def test_equal_word_lists_are_compiled_once_while_they_are_used_and_old_ones_are_forgotten() -> None:
    compiled: list[tuple[bytes, ...]] = []

    def compile_words(words: tuple[bytes, ...]) -> int:
        compiled.append(words)
        return len(compiled)

    cache: CompileCache[tuple[bytes, ...], int] = CompileCache(compile_words, max_size=10)
    first, second, third = (b"abc",), (b"de", b"f"), (b"ghij",)
    assert [cache(words) for words in (first, second, first, second, first)] == [1, 2, 1, 2, 1]
    assert cache(third) == 3, "4 + 5 + 5 items are too many"
    assert (cache(first), cache(third), cache(second)) == (1, 3, 4)
    large = (b"x" * 100,)
    assert cache(large) == cache(large) == 5
