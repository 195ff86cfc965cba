"""The client and the proxies that the environment names: which one it takes, and what it says when that fails."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator

import pytest

from gptj_triton.client import Client, ClientError, ConnectionFailedError, NoAnswerInTimeError, ServerError
from gptj_triton.client.proxy import grpc_proxy, http_proxy

FAR = "192.0.2.1:8000"  # an address for documentation, RFC 5737: nothing is there
NOWHERE = "http://127.0.0.1:1"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy")
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 14\r\nConnection: close\r\n\r\n<html>No</html"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)


class Peer:
    """A server that answers each connection's first bytes with `reply`, or never, and keeps what it was sent."""

    def __init__(self, reply: bytes | None) -> None:
        self.received: list[bytes] = []
        self._reply = reply
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://user:secret@127.0.0.1:{self._listener.getsockname()[1]}"
        self.shown = self.url.replace("user:secret@", "")
        self._silent: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self.received.append(connection.recv(65536))
            if self.received[-1] == b"":
                return connection.close()
            if self._reply is None:
                self._silent.append(connection)
                continue
            connection.sendall(self._reply)
            connection.close()

    def close(self) -> None:
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()
        for each in (self._listener, *self._silent):
            each.close()


@pytest.fixture
def forbidding() -> Iterator[Peer]:
    peer = Peer(FORBIDDEN)
    yield peer
    peer.close()


def failure(url: str, protocol: str, timeout: float = 10.0) -> ClientError:
    with Client(url, protocol, timeout) as client, pytest.raises(ClientError) as caught:
        client.generate("Once")
    return caught.value


@pytest.mark.parametrize(
    ("protocol", "variable"),
    [
        *(("generate", variable) for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")),
        *(("grpc", variable) for variable in ("grpc_proxy", "https_proxy", "http_proxy")),
    ],
)
def test_a_proxy_that_is_nowhere_is_named_with_its_variable(
    protocol: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, NOWHERE)
    error = failure(FAR, protocol)
    assert isinstance(error, ConnectionFailedError)
    assert str(error) == f"cannot reach {FAR} through the proxy {NOWHERE} ({variable}): Connection refused"


@pytest.mark.parametrize("protocol", ["generate", "http", "grpc"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_no_proxy_is_asked_for_this_machine(
    host: str, protocol: str, forbidding: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "grpc_proxy"):
        monkeypatch.setenv(variable, forbidding.url)
    error = failure(f"{host}:1", protocol)
    assert "proxy" not in str(error) and forbidding.received == []


def test_an_answer_of_the_proxy_is_not_taken_for_the_servers(forbidding: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", forbidding.url)
    error = failure(FAR, "generate")
    assert isinstance(error, ServerError) and error.status == "403"
    assert str(error).startswith(f"HTTP 403 from {FAR} through the proxy {forbidding.shown} (http_proxy), not an")


def test_a_proxy_that_refuses_grpc_is_named(forbidding: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", forbidding.url)
    error = str(failure(FAR, "grpc"))
    assert f"through the proxy {forbidding.shown} (http_proxy)" in error and "403" in error


@pytest.mark.parametrize("protocol", ["generate", "grpc"])
def test_a_proxy_gets_the_password_that_no_error_shows(
    protocol: str, forbidding: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", forbidding.url)
    assert "secret" not in str(failure(FAR, protocol))
    assert b"Basic " + base64.b64encode(b"user:secret") in forbidding.received[0]


@pytest.mark.parametrize("protocol", ["generate", "grpc"])
def test_a_proxy_that_says_nothing_is_named(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Peer(None)
    monkeypatch.setenv("http_proxy", silent.url)
    error = failure(FAR, protocol, timeout=1.0)
    silent.close()
    assert isinstance(error, NoAnswerInTimeError) and f"the proxy {silent.shown} (http_proxy) in 1 s" in str(error)


@pytest.mark.parametrize("protocol", ["generate", "grpc"])
@pytest.mark.parametrize("url", ["http://nowhere.invalid:3128", "127.0.0.1:1", "http://127.0.0.1:abc"])
def test_a_proxy_that_cannot_be_used_is_named(protocol: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", url)
    shown = url if "://" in url else f"http://{url}"
    assert f"through the proxy {shown} (http_proxy): " in str(failure(FAR, protocol))


def test_socks_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    assert "the proxy socks5://127.0.0.1:1 (ALL_PROXY): Missing dependencies for SOCKS" in str(failure(FAR, "generate"))


def test_grpc_takes_its_own_variable_first_and_an_empty_one_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://one:1")
    monkeypatch.setenv("grpc_proxy", "http://two:1")
    assert (str(http_proxy(FAR)), str(grpc_proxy(FAR))) == (
        "the proxy http://one:1 (http_proxy)",
        "the proxy http://two:1 (grpc_proxy)",
    )
    monkeypatch.setenv("grpc_proxy", "")
    assert grpc_proxy(FAR) is None


@pytest.mark.parametrize("url", ["https://one:1", "socks5://one:1", "http://:3128"])
def test_grpc_goes_through_no_other_kind_of_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", url)
    assert grpc_proxy(FAR) is None


@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize(
    ("exceptions", "excepted"),
    [("*", True), ("192.0.2.0/24", True), ("example.org, 192.0.2.1", True), ("example.org", False)],
)
def test_hosts_without_a_proxy(variable: str, exceptions: str, excepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", NOWHERE)
    monkeypatch.setenv(variable, exceptions)
    assert (http_proxy(FAR) is None, grpc_proxy(FAR) is None) == (excepted, excepted)
