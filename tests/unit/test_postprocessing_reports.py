"""Whoever generates for a client that left is told, and nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from gptj_triton.triton.cancel_reports import CancelReports


@pytest.fixture
def reports() -> Iterator[CancelReports]:
    reports = CancelReports()
    yield reports
    reports.close()


@pytest.fixture
def inbox() -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 30000)
        yield socket


def test_the_payload_arrives_as_it_is(reports: CancelReports, inbox: zmq.Socket[bytes], tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine.sock"
    inbox.bind(address)
    payloads = [b"\x82\xa4\n\x00\xff", b"", b"again"]
    assert reports.send(address.encode() + b"\n" + payload for payload in payloads) == []
    assert [inbox.recv() for _ in payloads] == payloads


def test_a_report_made_before_somebody_listens_arrives_then(
    reports: CancelReports, inbox: zmq.Socket[bytes], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/engine.sock"
    assert reports.send([address.encode() + b"\nlate"]) == []
    inbox.bind(address)
    assert inbox.recv() == b"late"


def test_an_address_where_nobody_listens_holds_nobody_up(reports: CancelReports, tmp_path: Path) -> None:
    start = time.monotonic()
    failures = reports.send([f"ipc://{tmp_path}/nobody\nx".encode()] * 3000)
    reports.close()
    assert time.monotonic() - start < 10.0
    assert 0 < len(failures) < 3000 and "nobody" in failures[0]


@pytest.mark.parametrize("handle", [b"", b"\n", b"nonsense\nx", b"\xff\nx", b"ipc://\nx", b"no newline"])
def test_a_handle_that_says_nothing_is_a_line_and_no_exception(reports: CancelReports, handle: bytes) -> None:
    [line] = reports.send([handle])
    assert line.startswith("cannot report a client that left")
