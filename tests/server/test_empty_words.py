"""An empty word means nothing: in every list, by every way in, alone and among others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http

from gptj_triton.client import Client
from tests.server.conftest import CLOSE
from tests.server.test_client import PROTOCOLS, STREAMING_PROTOCOLS, run, url_of
from tests.server.test_outputs import Arrays, Asker

PROMPT = "Once upon a time"
MODULES = [tritonclient.http, tritonclient.grpc]


def text(server: Any, model: str = "ensemble", /, **fields: Any) -> str:
    body = {"text_input": PROMPT, "max_tokens": 16, "stream": False, **fields}
    url = f"http://{server.http_url}/v2/models/{model}/generate"
    response = requests.post(url, json=body, headers=CLOSE, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["text_output"])


def infer(server: Any, protocol: Any, model: str, tensors: dict[str, Any]) -> Arrays:
    """The outputs by name; a list among the `tensors` is one of strings."""
    arrays = {
        name: np.asarray(each, None if isinstance(each, np.ndarray) else object) for name, each in tensors.items()
    }
    asker = Asker(protocol, server.http_url if protocol is tritonclient.http else server.grpc_url)
    with asker.client:
        return asker.ask(model, arrays)


@pytest.fixture(scope="module")
def plain(server: Any) -> str:
    return text(server)


@pytest.fixture(scope="module")
def word(plain: str) -> str:
    """The third word of the text."""
    return plain.split()[2]


@pytest.mark.parametrize("model", ["ensemble", "ensemble_stream"])
@pytest.mark.parametrize("empty", ["", [], [""], ["", ""], [""] * 2000], ids=lambda value: repr(value)[:12])
def test_empty_words_alone_are_no_words(server: Any, plain: str, model: str, empty: Any) -> None:
    assert text(server, model, bad_words=empty, stop_words=empty) == plain
    assert text(server, model, parameters={"bad_words": empty, "stop_words": empty}) == plain


def test_the_first_request_of_tensorrt_llms_readme_is_answered(server: Any) -> None:
    body = '{"text_input": "What is machine learning?", "max_tokens": 20, "bad_words": "", "stop_words": ""}'
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    response = requests.post(url, data=body, headers=CLOSE, timeout=60)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["bad_words", "stop_words"])
def test_the_client_sends_empty_words_and_they_mean_nothing(server: Any, word: str, protocol: str, name: str) -> None:
    with Client(url_of(server, protocol), protocol) as client:

        def ask(*words: str) -> Any:
            return client.generate(PROMPT, max_tokens=16, **{name: list(words)})

        assert ask("") == ask("", "") == ask() == client.generate(PROMPT, max_tokens=16)
        assert ask("", word) == ask(word, "") == ask("", word, "") == ask(word) != ask()


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_a_stream_takes_empty_words(server: Any, plain: str, word: str, protocol: str) -> None:
    with Client(url_of(server, protocol), protocol) as client:

        def ask(*words: str) -> str:
            return "".join(piece.text[0] for piece in client.stream(PROMPT, max_tokens=16, stop_words=list(words)))

        assert ask("") == plain
        assert ask("", word, "") == plain[: plain.index(word)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_takes_empty_words(server: Any, plain: str, protocol: str) -> None:
    words = ["--stop-words", "", "--bad-words", ""]
    done = run(PROMPT, "--max-tokens", "16", *words, "--protocol", protocol, "--url", url_of(server, protocol))
    assert (done.stdout.decode(), done.stderr) == (f"{plain}\n", b"")


@pytest.mark.parametrize("protocol", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", ["bad_words", "stop_words"])
def test_rows_with_unequally_many_words_are_padded_with_empty_ones(server: Any, protocol: Any, name: str) -> None:
    prompts, words = [PROMPT, "The wolf", "A king"], [["", ""], ["the", ""], [",", "and"]]
    max_tokens = np.full((3, 1), 16, np.int32)
    fields = {"text_input": [[each] for each in prompts], "max_tokens": max_tokens, name: words}
    together = infer(server, protocol, "ensemble", fields)["text_output"].ravel().tolist()
    alone = [
        text(server, text_input=prompt, **{name: [word for word in each if word]})
        for prompt, each in zip(prompts, words, strict=True)
    ]
    assert [each.decode() for each in together] == alone


@pytest.mark.parametrize("protocol", MODULES, ids=lambda module: module.__name__)
def test_the_backend_takes_empty_stop_strings_and_empty_token_lists(server: Any, protocol: Any) -> None:
    prompt = np.array([[2167, 716, 258, 515]], np.uint32)
    request = {
        "input_ids": prompt,
        "input_lengths": np.array([[4]], np.uint32),
        "request_output_len": np.array([[16]], np.uint32),
    }

    def ids(**words: Any) -> list[int]:
        found = infer(server, protocol, "fastertransformer", request | words)["output_ids"]
        return list(found.ravel().tolist())

    plain = ids()
    stop = plain[6]
    assert ids(stop_strings=[[""]]) == ids(stop_strings=[["", ""]]) == plain
    assert ids(stop_strings=[["", ","]]) == ids(stop_strings=[[",", ""]]) == ids(stop_strings=[[","]])
    for name in ("stop_words_list", "bad_words_list"):
        only = ids(**{name: np.array([[[stop], [1]]], np.int32)})
        assert only != plain
        for empty in ([[0], [-1]], [[0], [0]], [[0, 0], [0, 0]], [[-1, -1], [-1, -1]]):
            assert ids(**{name: np.array([empty], np.int32)}) == plain
        for mixed in ([[stop, 0], [0, 1]], [[stop, 0, 0], [1, 1, -1]], [[stop, 0, 0], [0, 0, 1]]):
            assert ids(**{name: np.array([mixed], np.int32)}) == only
