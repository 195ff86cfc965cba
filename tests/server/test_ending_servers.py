"""A server that refuses a request and is gone when nginx asks it once more for its words, as at the end of a drain: the
client may send the request again."""

from __future__ import annotations

import socket
from pathlib import Path

from gptj_triton.bench.proxies import SERVERS
from tests.server.proxied import end, running

REFUSAL = b'{"error":"in ensemble \'ensemble\', UNAVAILABLE: the server is shutting down"}'


def test_a_server_that_refused_and_then_ended_means_not_now(tmp_path: Path) -> None:
    refused: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        """The words at first; nothing at all to those who ask again."""
        if len(received) % 2:
            head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(
                REFUSAL
            )
            connection.sendall(head + b"Connection: close\r\n\r\n" + REFUSAL)
            refused.append(REFUSAL)

    with end(answer) as (one, received), running("nginx", [one] * SERVERS, tmp_path) as proxy:
        answered = proxy.generate()
    assert refused
    assert answered.status_code == 503, answered.text
    assert "UNAVAILABLE: " in answered.json()["error"]
    assert answered.headers["Retry-After"]
