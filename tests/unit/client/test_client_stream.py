"""What the client makes of streams that no healthy server sends: they stall, break off, or are no streams at all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gptj_triton.client import (
    Client,
    ClientError,
    ConnectionFailedError,
    InvalidFieldError,
    NoAnswerInTimeError,
    ServerError,
)

PIECE = {
    "text_output": "é",
    "finish_reason": "",
    "sequence_length": 3,
    "num_input_tokens": [],
    "num_output_tokens": [],
    "cum_log_probs": [],
    "output_log_probs": [],
}
Send = Callable[[bytes], object]
Serve = Callable[[Callable[[Send], object]], str]


def event(**values: Any) -> bytes:
    return b"data: " + json.dumps(values, ensure_ascii=False).encode() + b"\n\n"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that answers 200 with what a function sends in chunks; breaking off unless it returns True."""
    servers = []

    def start(script: Callable[[Send], object]) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.close_connection = True
                if script(lambda data: self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))):
                    self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *arguments: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def texts_until(error: type[ClientError], url: str, timeout: float = 10.0) -> tuple[list[str], ClientError]:
    """What was streamed before the error came."""
    texts: list[str] = []
    with Client(url, timeout=timeout) as client, pytest.raises(error) as caught:
        texts.extend(piece.text[0] for piece in client.stream("Once"))
    return texts, caught.value


def test_events_may_be_split_and_joined_by_the_way(serve: Serve) -> None:
    def script(send: Send) -> bool:
        data = event(**PIECE) * 3
        for chunk in (data[:10], data[10:60], data[60:]):
            send(chunk)
        return True

    with Client(serve(script)) as client:
        assert [piece.text for piece in client.stream("Once")] == [["é"]] * 3


def test_an_error_amid_the_stream_comes_after_the_text_before_it(serve: Serve) -> None:
    url = serve(lambda send: (send(event(**PIECE)), send(event(error="the engine\nended"))))
    texts, error = texts_until(ServerError, url)
    assert texts == ["é"] and str(error) == "the engine ended"


def test_a_stream_that_breaks_off_is_a_failed_connection(serve: Serve) -> None:
    texts, error = texts_until(ConnectionFailedError, serve(lambda send: send(event(**PIECE)) and False))
    assert texts == ["é"] and "127.0.0.1" in str(error)


def test_a_stream_that_stalls_is_no_answer_in_time(serve: Serve) -> None:
    given_up = threading.Event()

    def script(send: Send) -> None:
        send(event(**PIECE))
        given_up.wait(60)

    texts, error = texts_until(NoAnswerInTimeError, serve(script), timeout=1.5)
    given_up.set()
    assert texts == ["é"] and "1.5 s" in str(error)


def test_what_is_no_event_is_shown(serve: Serve) -> None:
    texts, error = texts_until(ServerError, serve(lambda send: send(b"<html>\n")))
    assert texts == [] and "<html>" in str(error)


def test_closing_the_generator_closes_the_connection(serve: Serve) -> None:
    seen = threading.Event()

    def script(send: Send) -> None:
        try:
            while True:
                send(event(**PIECE))
                time.sleep(0.01)
        except OSError:
            seen.set()

    with Client(serve(script)) as client:
        pieces = client.stream("Once")
        next(pieces)
        pieces.close()
        assert seen.wait(30)


def test_protocol_http_refuses_to_stream_before_anything_is_sent() -> None:
    with Client("127.0.0.1:1", "http") as client, pytest.raises(InvalidFieldError, match="use generate or grpc"):
        client.stream("Once")


def test_fields_of_a_stream_are_checked_before_anything_is_sent() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidFieldError, match="unknown field max_token"):
        client.stream("Once", max_token=3)
