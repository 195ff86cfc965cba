"""The client against a real server: the same answer by every protocol, whole or streamed, and every failure in one line
on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from gptj_triton.client import DEFAULT_URLS, Client, ServerError
from tests.server.conftest import FREE_WITHIN, SOON_SECONDS, is_idle, wait_for_sequences, wait_until

CLIENT = Path(__file__).parents[2] / "tools" / "client.py"
PROTOCOLS = list(DEFAULT_URLS)
STREAMING_PROTOCOLS = ["generate", "grpc"]
PROMPTS = ["Once upon a time", "The wolf", "There was once a king who had three daughters"]


def url_of(server: Any, protocol: str) -> str:
    return str(server.grpc_url if protocol == "grpc" else server.http_url)


def run(
    *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[bytes]:
    """Runs client.py; `environment` is set besides what this process has."""
    command = [sys.executable, str(CLIENT), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, env={**os.environ, **environment})


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
def test_proxies_of_the_environment_do_not_stand_between_the_client_and_this_machine(
    server: Any, protocol: str
) -> None:
    nowhere = dict.fromkeys(["http_proxy", "https_proxy", "ALL_PROXY", "grpc_proxy"], "http://127.0.0.1:1")
    asked = [PROMPTS[0], "--max-tokens", "2", "--protocol", protocol, "--url", url_of(server, protocol)]
    for further in [[], ["--stream"]] if protocol in STREAMING_PROTOCOLS else [[]]:
        done = run(*asked, *further, environment=nowhere)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
@pytest.mark.parametrize("further", [[], ["--stream"]])
def test_a_proxy_that_is_nowhere_is_one_line(protocol: str, further: list[str]) -> None:
    far = ["--protocol", protocol, "--url", "192.0.2.1:8000", *further]
    nowhere = dict.fromkeys(["http_proxy", "grpc_proxy"], "http://user:secret@127.0.0.1:1")
    done = run("Once", *far, environment=nowhere)
    assert_fails_in_one_line(done, "192.0.2.1:8000 through the proxy http://127.0.0.1:1 (", "refused")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_wrong_port_is_one_line(server: Any, protocol: str) -> None:
    wrong = server.http_url if protocol == "grpc" else server.grpc_url
    assert_fails_in_one_line(run("Once", "--timeout", "5", "--protocol", protocol, "--url", wrong), "cannot reach")


def test_a_prompt_that_is_not_utf8_is_one_line(server: Any) -> None:
    done = run("-", "--url", server.http_url, stdin=b"Onc\xc3\n")
    assert_fails_in_one_line(done, "text_input", "not valid UTF-8 at byte 3")


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_a_stream_prints_the_text_that_comes_whole_otherwise(server: Any, protocol: str) -> None:
    asked = [PROMPTS[0], "--max-tokens", "40", "--stop-words", "daughter who", "--no-exclude-input-in-output"]
    whole = run(*asked, "--url", server.http_url)
    streamed = run(*asked, "--stream", "--protocol", protocol, "--url", url_of(server, protocol))
    assert (streamed.returncode, streamed.stderr) == (0, b"")
    assert streamed.stdout == whole.stdout
    assert len(streamed.stdout) > 30


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_pieces_make_up_the_whole_answer(server: Any, protocol: str) -> None:
    fields: dict[str, Any] = {"max_tokens": 30, "top_k": 20, "seed": 5, "num_return_sequences": 3, "stop_words": [","]}
    fields |= {"return_log_probs": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    with Client(server.http_url) as client:
        whole = client.generate("The wolf", **fields)
    with Client(url_of(server, protocol), protocol) as client:
        *pieces, last = client.stream("The wolf", **fields)
    texts = ["".join(parts) for parts in zip(*[piece.text for piece in [*pieces, last]], strict=True)]
    assert texts == whole.text
    assert pieces
    for piece in pieces:
        assert piece.finish_reason == [""] * 3
        assert piece.num_input_tokens == whole.num_input_tokens
    counts = zip(*[piece.num_output_tokens for piece in [*pieces, last]], strict=True)
    assert [sum(numbers) for numbers in counts] == whole.num_output_tokens
    assert (last.finish_reason, last.sequence_length) == (whole.finish_reason, whole.sequence_length)
    assert last.num_input_tokens == whole.num_input_tokens
    assert last.cum_log_probs == pytest.approx(whole.cum_log_probs)
    assert last.output_log_probs == [pytest.approx(row) for row in whole.output_log_probs]


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_each_piece_is_a_line_of_json(server: Any, protocol: str) -> None:
    url = url_of(server, protocol)
    done = run(PROMPTS[0], "--stream", "--json", "--max-tokens", "8", "--protocol", protocol, "--url", url)
    pieces = [json.loads(line) for line in done.stdout.splitlines()]
    assert [piece["finish_reason"] for piece in pieces] == [[""]] * (len(pieces) - 1) + [["length"]]
    with Client(server.http_url) as client:
        assert "".join(piece["text"][0] for piece in pieces) == client.generate(PROMPTS[0], max_tokens=8).text[0]


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_ctrl_c_keeps_what_was_printed_and_ends_the_request_on_the_server(server: Any, protocol: str) -> None:
    asked = [PROMPTS[0], "--stream", "--max-tokens", "1000", "--min-tokens", "1000"]
    command = [sys.executable, str(CLIENT), *asked, "--protocol", protocol, "--url", url_of(server, protocol)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        wait_for_sequences(server, 1)
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=SOON_SECONDS)
    assert (process.returncode, error) == (130, b"")
    assert first.decode().strip() and rest.endswith(b"\n")
    wait_until(lambda: is_idle(server), "idle engine", FREE_WITHIN)


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_closing_the_generator_ends_the_request_and_the_client_goes_on(server: Any, protocol: str) -> None:
    with Client(url_of(server, protocol), protocol) as client:
        with contextlib.closing(client.stream(PROMPTS[0], max_tokens=1000, min_tokens=1000)) as pieces:
            assert [next(pieces).finish_reason for _ in range(3)] == [[""]] * 3
            wait_for_sequences(server, 1)
        wait_until(lambda: is_idle(server), "idle engine", FREE_WITHIN)
        assert client.generate(PROMPTS[0], max_tokens=4).finish_reason == ["length"]
        assert list(client.stream(PROMPTS[0], max_tokens=4))[-1].finish_reason == ["length"]


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_a_reader_that_closes_its_end_ends_the_stream_quietly(server: Any, protocol: str) -> None:
    asked = [PROMPTS[0], "--stream", "--max-tokens", "1000", "--min-tokens", "1000"]
    command = [sys.executable, str(CLIENT), *asked, "--protocol", protocol, "--url", url_of(server, protocol)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(5)
        wait_for_sequences(server, 1)
        process.stdout.close()
        assert (process.wait(SOON_SECONDS), process.stderr.read()) == (1, b"")
    wait_until(lambda: is_idle(server), "idle engine", FREE_WITHIN)


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--max-tokens", "0"], ["max_tokens", "0"]),
        (["--beam-width", "2"], ["beam_width", "beams are not streamed"]),
        (["--num-return-sequences", "2"], ["num_return_sequences", "--json"]),
        (["--max-tokens", "400", "--timeout", "0.001"], ["no answer", "0.001 s"]),
    ],
)
def test_a_stream_that_is_refused_is_one_line(server: Any, protocol: str, asked: list[str], words: list[str]) -> None:
    done = run(PROMPTS[0], "--stream", *asked, "--protocol", protocol, "--url", url_of(server, protocol))
    assert_fails_in_one_line(done, *words)


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_a_refused_stream_raises_a_server_error(server: Any, protocol: str) -> None:
    with Client(url_of(server, protocol), protocol) as client, pytest.raises(ServerError, match="text_input is empty"):
        next(client.stream(""))


@pytest.mark.parametrize("protocol", STREAMING_PROTOCOLS)
def test_a_stream_from_nowhere_names_the_url(protocol: str) -> None:
    done = run("Once", "--stream", "--protocol", protocol, "--url", "127.0.0.1:1")
    assert_fails_in_one_line(done, "127.0.0.1:1", "refused")


def test_a_stream_by_http_is_refused_in_words() -> None:
    assert_fails_in_one_line(run("Once", "--stream", "--protocol", "http"), "use generate or grpc")
