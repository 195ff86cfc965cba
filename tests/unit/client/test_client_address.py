"""Which URLs the client takes, and which of them lead to this machine."""

from __future__ import annotations

import pytest

from gptj_triton.client import InvalidFieldError, host_and_port
from gptj_triton.client.address import is_this_machine


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://localhost:8000", "HTTP://localhost:8000/", " localhost:8000\n"]
)
def test_http_may_stand_before_host_and_port(url: str) -> None:
    assert host_and_port(url) == "localhost:8000"


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert host_and_port("http://[::1]:8000") == "[::1]:8000"
    for url in ("::1:8000", "[::1]"):
        with pytest.raises(InvalidFieldError, match=r"IPv6 address in brackets, \[::1\]:8000"):
            host_and_port(url)


def test_https_is_called_that() -> None:
    with pytest.raises(InvalidFieldError, match="'https://localhost:8000': the client speaks no TLS"):
        host_and_port("https://localhost:8000")


@pytest.mark.parametrize(
    "url",
    [
        *("", " ", "http://", "localhost", "localhost:", ":8000", "localhost:abc", "localhost:0", "localhost:99999"),
        *(
            "grpc://localhost:8001",
            "tcp://localhost:8000",
            "localhost:8000/v2",
            "localhost:8000?x=1",
            "u:p@localhost:1",
        ),
        *("local host:8000", "..:8000", f"{'a' * 70}.example:8000", "localhost:+1"),
    ],
)
def test_what_is_not_host_and_port_is_shown(url: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        host_and_port(url)
    assert str(caught.value) == f"url {url!r}: give HOST:PORT"


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST", "localhost.", "gptj.localhost", "127.0.0.1", "127.8.9.10", "127.1"),
        *("[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]"),
    ],
)
def test_this_machine(host: str) -> None:
    assert is_this_machine(f"{host}:8000")


@pytest.mark.parametrize(
    "host",
    ["10.0.0.1", "192.0.2.1", "example.org", "mylocalhost", "localhost.example.org", "[fe80::1]", "[::ffff:10.0.0.1]"],
)
def test_other_machines(host: str) -> None:
    assert not is_this_machine(f"{host}:8000")
