"""The client against a real server: the same answer by every protocol, and every failure in one line on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from client import DEFAULT_URLS, Client, ServerError

CLIENT = Path(__file__).parents[2] / "tools" / "client.py"
PROTOCOLS = list(DEFAULT_URLS)
PROMPTS = ["Once upon a time", "The wolf", "There was once a king who had three daughters"]


def url_of(server: Any, protocol: str) -> str:
    return str(server.grpc_url if protocol == "grpc" else server.http_url)


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, str(CLIENT), *arguments], input=stdin, capture_output=True, timeout=120)


def assert_fails_in_one_line(done: subprocess.CompletedProcess[bytes], *words: str) -> None:
    error = done.stderr.decode()
    assert done.returncode == 1
    assert done.stdout == b""
    assert error.startswith("client.py: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_every_protocol_prints_the_same_text(server: Any) -> None:
    texts = set()
    for protocol in PROTOCOLS:
        done = run(PROMPTS[0], "--max-tokens", "12", "--protocol", protocol, "--url", url_of(server, protocol))
        assert (done.returncode, done.stderr) == (0, b"")
        texts.add(done.stdout.decode())
    assert len(texts) == 1
    assert texts.pop().strip()


def test_every_protocol_gives_the_same_whole_answer(server: Any) -> None:
    asked = ["--return-log-probs", "--return-num-input-tokens", "--return-num-output-tokens", "--max-tokens", "6"]
    answers = []
    for protocol in PROTOCOLS:
        done = run(
            "-", "--json", *asked, "--protocol", protocol, "--url", url_of(server, protocol), stdin=b"The wolf\n"
        )
        answers.append(json.loads(done.stdout))
    answer = answers[0]
    with Client(server.http_url) as client:  # the newline that ends the input is no part of the prompt
        assert client.generate("The wolf", return_num_input_tokens=True).num_input_tokens == answer["num_input_tokens"]
    for other in answers[1:]:
        assert other.pop("output_log_probs") == [pytest.approx(row) for row in answer["output_log_probs"]]
        assert other.pop("cum_log_probs") == pytest.approx(answer["cum_log_probs"])
        assert other.items() <= answer.items()
    [new] = answer["num_output_tokens"]
    assert answer["sequence_length"] == [answer["num_input_tokens"] + new]
    assert [len(row) for row in answer["output_log_probs"]] == [new]
    assert answer["cum_log_probs"] == pytest.approx([sum(answer["output_log_probs"][0])], rel=1e-4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_was_not_asked_for_is_empty(server: Any, protocol: str) -> None:
    with Client(url_of(server, protocol), protocol) as client:
        answer = client.generate(PROMPTS[0], max_tokens=2)
    assert (answer.num_input_tokens, answer.num_output_tokens) == (None, [])
    assert (answer.cum_log_probs, answer.output_log_probs) == ([], [])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_lists_of_words_arrive(server: Any, protocol: str) -> None:
    with Client(url_of(server, protocol), protocol) as client:
        text = client.generate(PROMPTS[0], max_tokens=30).text[0]
        first, second = text.split()[2:4]
        stopped = client.generate(PROMPTS[0], max_tokens=30, stop_words=["no such words", first, second])
    assert stopped.finish_reason == ["stop"]
    assert first not in stopped.text[0]
    assert text.startswith(stopped.text[0])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_batch_answers_each_prompt_as_if_alone(server: Any, protocol: str) -> None:
    with Client(url_of(server, protocol), protocol) as client:
        alone = [client.generate(prompt, max_tokens=8, stop_words=["."]) for prompt in PROMPTS]
        assert client.generate_batch(PROMPTS, max_tokens=8, stop_words=["."]) == alone


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_servers_refusal_is_one_line(server: Any, protocol: str) -> None:
    done = run(PROMPTS[0], "--max-tokens", "0", "--protocol", protocol, "--url", url_of(server, protocol))
    assert_fails_in_one_line(done, "max_tokens", "0")


@pytest.mark.parametrize(("protocol", "status"), [("generate", "400"), ("http", "400"), ("grpc", "INVALID_ARGUMENT")])
def test_a_server_error_has_its_status(server: Any, protocol: str, status: str) -> None:
    with Client(url_of(server, protocol), protocol) as client, pytest.raises(ServerError) as caught:
        client.generate("")
    assert caught.value.status == status


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_answer_in_time_is_one_line(server: Any, protocol: str) -> None:
    url = url_of(server, protocol)
    done = run(PROMPTS[0], "--max-tokens", "400", "--timeout", "0.02", "--protocol", protocol, "--url", url)
    assert_fails_in_one_line(done, "no answer", "0.02 s")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_refused_connection_names_the_url(protocol: str) -> None:
    assert_fails_in_one_line(run("Once", "--protocol", protocol, "--url", "127.0.0.1:1"), "127.0.0.1:1", "refused")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_wrong_port_is_one_line(server: Any, protocol: str) -> None:
    wrong = server.http_url if protocol == "grpc" else server.grpc_url
    assert_fails_in_one_line(run("Once", "--timeout", "5", "--protocol", protocol, "--url", wrong), "cannot reach")


def test_a_prompt_that_is_not_utf8_is_one_line(server: Any) -> None:
    done = run("-", "--url", server.http_url, stdin=b"Onc\xc3\n")
    assert_fails_in_one_line(done, "text_input", "not valid UTF-8 at byte 3")
