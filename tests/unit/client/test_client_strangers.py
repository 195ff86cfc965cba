"""What the client says where something answers that is not this project's server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from gptj_triton.client import Client, ClientError, ConnectionFailedError, ServerError, UnavailableError

Answer = Callable[[bytes], str]


@pytest.fixture
def answer() -> Iterator[Answer]:
    """Starts a server that answers one connection with some bytes; its HOST:PORT."""
    ends = []

    def start(reply: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with listener, listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(10)
                while connection.recv(65536):  # else the connection is reset
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        ends.append(thread.join)
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for end in ends:
        end()


def http(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def failure(url: str, protocol: str, stream: bool = False) -> ClientError:
    with Client(url, protocol, timeout=10.0) as client, pytest.raises(ClientError) as caught:
        next(client.stream("Once")) if stream else client.generate("Once")
    return caught.value


@pytest.mark.parametrize("protocol", ["generate", "http"])
@pytest.mark.parametrize(
    ("reply", "status", "words"),
    [
        (http("403 Forbidden", b"<html>No</html>"), "403", "<html>No</html>"),
        (http("503 Service Unavailable", b"no healthy upstream"), "503", "no healthy upstream"),
        (http("502 Bad Gateway", b""), "502", "not an answer of Triton: ''"),
        (http("200 OK", b"<html>Log in</html>"), "200", "not an answer of Triton"),
        (http("308 Permanent Redirect", b"", "Location: https://127.0.0.1/"), "308", "not an answer of Triton"),
    ],
)
def test_another_web_servers_answer_has_its_status_and_its_words(
    protocol: str, reply: bytes, status: str, words: str, answer: Answer
) -> None:
    url = answer(reply)
    error = failure(url, protocol)
    assert isinstance(error, ServerError) and error.status == status
    assert str(error).startswith(f"HTTP {status} from {url}, not ") and words in str(error)


@pytest.mark.parametrize("protocol", ["generate", "http"])
@pytest.mark.parametrize("before", ["", "in ensemble 'ensemble', "])
def test_an_error_that_says_not_now_has_a_class_of_its_own(protocol: str, before: str, answer: Answer) -> None:
    message = f"{before}UNAVAILABLE: the engine is not ready yet"
    error = failure(answer(http("400 Bad Request", json.dumps({"error": message}).encode())), protocol)
    assert isinstance(error, UnavailableError)
    assert (str(error), error.status) == (message, "400")
    quoted = json.dumps({"error": f"unknown field '{message}'"}).encode()
    assert not isinstance(failure(answer(http("400 Bad Request", quoted)), protocol), UnavailableError)


def test_a_redirection_is_not_followed_but_shown(answer: Answer) -> None:
    url = answer(http("302 Found", b"", "Location: http://127.0.0.1:1/login"))
    assert str(failure(url, "generate", stream=True)).endswith("'http://127.0.0.1:1/login'")


@pytest.mark.parametrize("body", [b"[1, 2]", b'"x"', b"{}", b'{"text_output": "Once"}', b"null", b'{"outputs": 3}'])
@pytest.mark.parametrize("protocol", ["generate", "http"])
def test_json_of_another_server_is_no_answer(protocol: str, body: bytes, answer: Answer) -> None:
    error = failure(answer(http("200 OK", body)), protocol)
    assert isinstance(error, ServerError)
    assert "not an answer of Triton" in str(error) or "it lacks " in str(error)


@pytest.mark.parametrize("body", [b"data: [1]\n\n", b"data: 3\n\n", b'data: {"choices": []}\n\n'])
def test_events_of_another_server_are_no_pieces(body: bytes, answer: Answer) -> None:
    error = failure(answer(http("200 OK", body)), "generate", stream=True)
    assert isinstance(error, ServerError)
    assert "not an event of ensemble_stream" in str(error) or "it lacks " in str(error)


@pytest.mark.parametrize("body", [b"", b"\n\n", b"<html>Log in</html>", b'{"status": "ok"}'])
def test_an_answer_without_events_is_no_stream(body: bytes, answer: Answer) -> None:
    url = answer(http("200 OK", body))
    error = failure(url, "generate", stream=True)
    assert isinstance(error, ServerError)
    assert str(error) == f"HTTP 200 from {url}, not an answer of Triton: {body.strip().decode()!r}"


@pytest.mark.parametrize(
    "banner", [b"SSH-2.0-OpenSSH_9.2p1\r\n", b"220 mail ESMTP\r\n", b"\x15\x03\x01\x00\x02\x02\x46"]
)
@pytest.mark.parametrize(
    ("protocol", "named"), [("generate", "no HTTP server"), ("http", "no HTTP server"), ("grpc", "")]
)
def test_what_speaks_no_http_is_called_that(banner: bytes, protocol: str, named: str, answer: Answer) -> None:
    url = answer(banner)
    error = failure(url, protocol)
    assert isinstance(error, ConnectionFailedError)
    assert str(error).startswith(f"cannot reach {url}: ") and named in str(error)


def test_a_web_server_is_no_grpc_server(answer: Answer) -> None:
    assert str(failure(answer(http("200 OK", b"<html>")), "grpc")).endswith("what answers is no gRPC server")


@pytest.mark.parametrize("protocol", ["generate", "http", "grpc"])
def test_a_host_that_does_not_resolve_is_named(protocol: str) -> None:
    error = failure("nowhere.invalid:8000", protocol)
    assert isinstance(error, ConnectionFailedError)
    assert str(error).startswith("cannot reach nowhere.invalid:8000: ")
