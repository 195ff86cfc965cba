"""Proxies of deploy/proxy that run, for tests; and an end behind them that shows what they send."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

from gptj_triton.bench.proxies import Behind, Proxy, prepare
from tests.server.conftest import free_ports, wait_until

KEY = "a-key-of-tests+/=.$"
GENERATE = "/v2/models/ensemble/generate"
STREAM = "/v2/models/ensemble_stream/generate_stream"


class Running:
    """A proxy that runs, and a client of it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.session = requests.Session()
        self.session.trust_env = False  # the environment may name other certificates
        self.session.verify = str(proxy.certificate)
        self.session.headers.update({"Authorization": f"Bearer {KEY}"})

    def ask(self, path: str = GENERATE, *, method: str = "POST", **options: Any) -> requests.Response:
        return self.session.request(method, f"https://{self.proxy.address}{path}", timeout=60, **options)

    def generate(self, path: str = GENERATE, **fields: Any) -> requests.Response:
        return self.ask(path, json={"text_input": "Once upon a time", "max_tokens": 1, **fields})

    def connect(self) -> ssl.SSLSocket:
        host, port = self.proxy.address.split(":")
        context = ssl.create_default_context(cafile=self.proxy.certificate)
        return context.wrap_socket(socket.create_connection((host, int(port)), timeout=60), server_hostname=host)

    def send(self, head: str, body: bytes = b"") -> tuple[int, str]:
        """Status and body of what comes back for bytes; the head is without its last empty line."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):  # it may answer before it has read all
                connection.sendall(f"{head}\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode() + body)
            return read_answer(connection)

    def log(self) -> list[dict[str, Any]]:
        lines = self.proxy.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def read_answer(connection: socket.socket) -> tuple[int, str]:
    received = b""
    connection.settimeout(60)
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
            head, end, body = received.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if end and length and len(body) >= int(length[0].partition(b":")[2]):
                break
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body.decode()


@contextlib.contextmanager
def running(name: str, servers: Sequence[Behind], folder: Path, **settings: Any) -> Iterator[Running]:
    """`nginx` or `haproxy` before three servers, until the block ends."""
    proxy = prepare(name, servers, free_ports(5), {"alice": KEY}, folder, **settings)
    with (folder / "errors").open("wb") as errors, proxy.log.open("ab") as log:
        process = subprocess.Popen(proxy.command, env=proxy.environment, stdout=log, stderr=errors)
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "errors").read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", int(proxy.address.rpartition(":")[2]))).close()
                return True
            return False

        wait_until(answers, f"answer of {name}")
        yield Running(proxy)
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def end(answer: Callable[[socket.socket], None], health: str = "200 OK") -> Iterator[tuple[Behind, list[bytes]]]:
    """What a proxy sends to a server, but for health checks: each request as it came. `answer` answers it."""
    received: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = connection.recv(1 << 20)
            head, _, body = request.partition(b"\r\n\r\n")
            if b"/v2/health/" in head:
                connection.sendall(f"HTTP/1.1 {health}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                return
            length = re.search(rb"\r\ncontent-length: *(\d+)", head.lower())
            while length and len(body) < int(length[1]) and (piece := connection.recv(1 << 20)):
                request, body = request + piece, body + piece
            received.append(request)
            answer(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        yield Behind(address, address), received
        listener.shutdown(socket.SHUT_RDWR)
