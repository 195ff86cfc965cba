"""Sizes of requests: each limit lets through what is at it, and refuses one more, by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gptj_triton.engine.sampling_params import Limits
from gptj_triton.errors import InvalidRequestError
from gptj_triton.limits import RequestLimits
from gptj_triton.process.messages import Welcome
from gptj_triton.triton.request_fields import REFUSALS, PromptLimits, new_token_limit, read_fields
from gptj_triton.triton.string_tensors import read_strings
from gptj_triton.triton.tensors import read_rows
from gptj_triton.triton.token_tensors import word_lists
from gptj_triton.triton.written_tokens import read_sequences

MODEL = Welcome(
    engine_pid=1,
    limits=Limits(vocab_size=100, context_length=64, stop_strings=True, num_pages=99, page_size=16, max_sequences=64),
    start_id=98,
    end_ids=(99,),
)
Request = dict[str, NDArray[Any]]


def column(value: int, rows: int = 2, dtype: Any = np.uint32) -> NDArray[Any]:
    return np.full((rows, 1), value, dtype)


def strings(*words: bytes, rows: int = 2) -> NDArray[Any]:
    array = np.empty((rows, len(words)), np.object_)
    array[:] = words
    return array


def ask_preprocessing(request: Request, limits: RequestLimits) -> None:
    """Checks a request of two rows, as the step does."""
    fields = {"text_input": strings(b"ab"), "max_tokens": column(3, dtype=np.int32)} | request
    prompt_limits = PromptLimits(64, 100, 8, limits)
    for row in read_fields(fields, prompt_limits):
        new_token_limit(row, 2, prompt_limits)


def ask_frontend(request: Request, limits: RequestLimits) -> None:
    """The same for the tensors of the model fastertransformer: prompts of 2 tokens, 3 new ones."""
    tensors = {
        "input_ids": np.ones((2, 2), np.uint32),
        "input_lengths": column(2),
        "request_output_len": column(3),
    }
    read_rows(tensors | request, MODEL, limits)


def ask_postprocessing(request: Request, limits: RequestLimits) -> None:
    """The same for an answer of two rows, with 5 tokens each."""
    tensors = {
        "output_ids": np.ones((2, 1, 5), np.uint32),
        "sequence_length": column(5),
        "input_lengths": column(2),
        "end_id": column(9),
    }
    read_sequences(tensors | request, 100, limits)


WORDS = word_lists([[[1, 2], [3]], []])
COPIES = {"num_return_sequences": column(3, dtype=np.int32)}
CASES: list[tuple[Callable[[Request, RequestLimits], None], str, int, Request]] = [
    (ask_preprocessing, "max_request_rows", 2, {}),
    (ask_preprocessing, "max_request_bytes", 2 * (4 + 2) + 2 * 4, {}),
    (ask_preprocessing, "max_request_sequences", 6, COPIES),
    (ask_preprocessing, "max_request_tokens", 6 * (1 + 3), COPIES),
    (ask_preprocessing, "max_request_strings", 6, {"stop_words": strings(b"a", b"", b"")}),
    (ask_preprocessing, "max_request_text_bytes", 4, {}),
    (ask_preprocessing, "max_request_word_bytes", 6 * (4 + 3), COPIES | {"bad_words": strings(b"abc", b"")}),
    (ask_preprocessing, "max_words", 3, {"stop_words": strings(b"a", b"", b"")}),
    (ask_preprocessing, "max_word_bytes", 5, {"bad_words": strings(b"abc", b"de")}),
    (ask_preprocessing, "max_prompt_tokens", 2, {}),
    (ask_preprocessing, "max_new_tokens", 3, {}),
    (ask_frontend, "max_request_rows", 2, {}),
    (ask_frontend, "max_request_bytes", 4 * (2 + 1 + 1) * 2, {}),
    (ask_frontend, "max_request_sequences", 6, COPIES),
    (ask_frontend, "max_request_sequences", 6, {"beam_width": column(3)}),
    (ask_frontend, "max_request_tokens", 6 * (2 + 3), COPIES),
    (ask_frontend, "max_request_strings", 4, {"stop_strings": strings(b"a", b"")}),
    (ask_frontend, "max_request_word_bytes", 6 * (4 + 3), COPIES | {"stop_strings": strings(b"abc")}),
    (ask_frontend, "max_request_word_bytes", 3 * 4 * 3, COPIES | {"bad_words_list": WORDS}),
    (ask_frontend, "max_words", 2, {"stop_strings": strings(b"a", b"")}),
    (ask_frontend, "max_words", 2, {"stop_words_list": word_lists([[[1]] * 4, []])}),
    (ask_frontend, "max_words", 2, {"end_ids": np.ones((2, 2), np.int32)}),
    (ask_frontend, "max_word_bytes", 3, {"stop_strings": strings(b"a", b"bc")}),
    (ask_frontend, "max_word_bytes", 2, {"bad_words_list": word_lists([[[1, 2], [3, 4]], []])}),
    (ask_frontend, "max_prompt_tokens", 2, {}),
    (ask_frontend, "max_new_tokens", 3, {}),
    (ask_postprocessing, "max_request_rows", 2, {}),
    (ask_postprocessing, "max_request_bytes", 4 * (5 + 1 + 1 + 1) * 2, {}),
    (ask_postprocessing, "max_request_sequences", 2, {}),
    (ask_postprocessing, "max_request_tokens", 10, {}),
    (ask_postprocessing, "max_request_strings", 4, {"stop_words": strings(b"a", b"")}),
    (ask_postprocessing, "max_request_word_bytes", 2 * (4 + 3), {"stop_words": strings(b"abc")}),
    (ask_postprocessing, "max_words", 2, {"stop_words": strings(b"a", b"")}),
    (ask_postprocessing, "max_words", 2, {"end_ids": np.ones((2, 2), np.int32)}),
    (ask_postprocessing, "max_word_bytes", 3, {"stop_words": strings(b"a", b"bc")}),
]


@pytest.mark.parametrize(("ask", "limit", "most", "request_"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_at_a_limit_is_taken_and_what_is_beyond_it_is_refused_by_the_limits_name(
    ask: Callable[[Request, RequestLimits], None], limit: str, most: int, request_: Request
) -> None:
    ask(request_, RequestLimits(**{limit: most}))
    with pytest.raises(REFUSALS, match=rf", allowed: 0 to \d+ \(limit {limit}\)$"):
        ask(request_, RequestLimits(**{limit: most - 1}))


def test_a_row_beyond_a_limit_is_named() -> None:
    prompts = {"input_lengths": np.array([[1], [2]], np.uint32)}
    with pytest.raises(InvalidRequestError, match=r"^row 1: number of tokens of the prompt is 2, allowed: 0 to 1 "):
        ask_frontend(prompts, RequestLimits(max_prompt_tokens=1))


def encoded(*words: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(len(word).to_bytes(4, "little") + word for word in words), np.uint8)


def test_strings_are_read_as_they_are_and_from_one_too_many_on_not_at_all() -> None:
    words = [b"", b"a\x00b", "é".encode(), b"x" * 300]
    assert read_strings(encoded(*words), 4).reshape([2, 2]).tolist() == [words[:2], words[2:]]
    assert read_strings(encoded(), 4).reshape([1, 0]).shape == (1, 0)
    unread = read_strings(encoded(*words), 3).reshape([2, 2])
    assert (unread.shape, unread.tolist()) == ((2, 2), [[b"", b""], [b"", b""]])
