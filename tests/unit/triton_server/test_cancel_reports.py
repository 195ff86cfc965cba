"""The engine is asked to cancel what a client left, nobody waits for it, and no handle leads to anybody else."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from gptj_triton.process.cancel_handle import LONGEST_HANDLE, make_handle
from gptj_triton.process.messages import Cancel, Goodbye, ToEngine
from gptj_triton.triton.cancel_reports import CancelReports

ENGINE, OTHER_ENGINE = "0123456789ab", "ba9876543210"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of a server with two engines."""
    server = tmp_path / "server"
    for engine in (ENGINE, OTHER_ENGINE):
        (server / engine).mkdir(parents=True, mode=0o700)
    server.chmod(0o700)
    return server


@pytest.fixture
def reports(directory: Path) -> Iterator[CancelReports]:
    reports = CancelReports(directory)
    yield reports
    reports.close()


@pytest.fixture
def open_inbox() -> Iterator[Callable[[Path], zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        inboxes = []

        def open_one(directory: Path) -> zmq.Socket[bytes]:
            inbox = context.socket(zmq.PULL)
            inboxes.append(inbox)
            inbox.setsockopt(zmq.RCVTIMEO, 30000)
            inbox.bind(f"ipc://{directory}/engine.sock")
            return inbox

        yield open_one
        for inbox in inboxes:
            inbox.close(linger=0)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket of somebody else, at which nobody may knock."""
    with socket.socket(socket.AF_UNIX) as listener:
        (tmp_path / "elsewhere").mkdir()
        listener.bind(str(tmp_path / "elsewhere" / "engine.sock"))
        listener.listen()
        listener.settimeout(0.3)
        yield listener


def handle(number: int, engine: str = ENGINE) -> bytes:
    return make_handle(engine, Cancel("frontend", number))


def leave_dead_socket(directory: Path) -> None:
    """What an engine that was killed leaves: a socket at which nobody listens."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "engine.sock"))


def test_each_engine_gets_the_cancel_messages_of_its_requests(
    reports: CancelReports, directory: Path, open_inbox: Callable[[Path], zmq.Socket[bytes]]
) -> None:
    inbox, other = open_inbox(directory / ENGINE), open_inbox(directory / OTHER_ENGINE)
    assert reports.send([handle(1), handle(5, OTHER_ENGINE), handle(2)]) == set()
    decoder = msgspec.msgpack.Decoder(ToEngine)
    assert [decoder.decode(inbox.recv()) for _ in range(2)] == [Cancel("frontend", 1), Cancel("frontend", 2)]
    assert decoder.decode(other.recv()) == Cancel("frontend", 5)


def test_a_report_made_before_the_engine_listens_arrives_then(
    reports: CancelReports, directory: Path, open_inbox: Callable[[Path], zmq.Socket[bytes]]
) -> None:
    leave_dead_socket(directory / ENGINE)
    assert reports.send([handle(1)]) == set()
    assert msgspec.msgpack.decode(open_inbox(directory / ENGINE).recv(), type=Cancel) == Cancel("frontend", 1)


def test_an_engine_that_does_not_listen_holds_nobody_up(reports: CancelReports, directory: Path) -> None:
    leave_dead_socket(directory / ENGINE)
    start = time.monotonic()
    failures = [failure for number in range(3000) for failure in reports.send([handle(number)])]
    reports.close()
    assert time.monotonic() - start < 10.0
    assert 0 < len(failures) < 3000 and "its engine cannot be asked" in failures[0]


def test_an_engine_that_is_gone_is_no_longer_connected_to(
    reports: CancelReports, directory: Path, open_inbox: Callable[[Path], zmq.Socket[bytes]]
) -> None:
    inbox = open_inbox(directory / ENGINE)
    assert reports.send([handle(1)]) == set()
    inbox.recv()
    inbox.close(linger=0)
    (directory / ENGINE / "engine.sock").unlink(missing_ok=True)
    [line] = reports.send([handle(2)])
    assert "no such engine" in line
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(directory / ENGINE / "engine.sock"))
        another.listen()
        another.settimeout(1.0)  # ZeroMQ tries to connect again after 0.1
        with pytest.raises(TimeoutError):
            another.accept()


def test_one_line_says_what_is_wrong_with_many_handles_and_repeats_none_of_them(reports: CancelReports) -> None:
    lines = reports.send([b"\x1b[31mSECRET" * number for number in range(1, 100)] + [handle(1), handle(2)])
    assert len(lines) == 2
    assert not any("SECRET" in line or ENGINE in line for line in lines)


def forged(**fields: object) -> bytes:
    """A handle that is right but for `fields`."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(handle(1)) | fields)


@pytest.mark.parametrize(
    "make",
    [
        lambda elsewhere: b"",
        lambda elsewhere: b"\n",
        lambda elsewhere: b"\xff\nx",
        lambda elsewhere: f"ipc://{elsewhere}/engine.sock\ncancel".encode(),
        lambda elsewhere: b"tcp://127.0.0.1:1\ncancel",
        lambda elsewhere: forged(engine=f"ipc://{elsewhere}/engine.sock"),
        lambda elsewhere: forged(engine=str(elsewhere)),
        lambda elsewhere: forged(engine="../elsewhere"),
        lambda elsewhere: forged(engine=f"{ENGINE}/../../elsewhere"),
        lambda elsewhere: forged(engine=""),
        lambda elsewhere: forged(engine=ENGINE + "\n"),
        lambda elsewhere: forged(engine=ENGINE.upper()),
        lambda elsewhere: forged(engine="ffffffffffff"),
        lambda elsewhere: forged(cancel=msgspec.to_builtins(Goodbye("frontend"))),
        lambda elsewhere: forged(cancel=b"cancel"),
        lambda elsewhere: forged(address="tcp://127.0.0.1:1"),
        lambda elsewhere: msgspec.msgpack.encode(Goodbye("frontend")),
        lambda elsewhere: handle(1) + b"\x00",
        lambda elsewhere: make_handle(ENGINE, Cancel("x" * LONGEST_HANDLE, 1)),
    ],
)
def test_a_handle_that_is_not_this_servers_own_leads_nowhere(
    reports: CancelReports,
    directory: Path,
    listener: socket.socket,
    open_inbox: Callable[[Path], zmq.Socket[bytes]],
    make: Callable[[Path], bytes],
) -> None:
    inbox = open_inbox(directory / ENGINE)
    [line] = reports.send([make(directory.parent / "elsewhere")])
    assert line.startswith("a client left, but ") and "nothing is cancelled" in line
    with pytest.raises(TimeoutError):
        listener.accept()
    assert not inbox.poll(0)


@pytest.mark.parametrize("kind", ["missing", "file", "symlink"])
def test_an_engine_without_a_socket_of_its_own_is_not_connected_to(
    reports: CancelReports, directory: Path, listener: socket.socket, kind: str
) -> None:
    path = directory / ENGINE / "engine.sock"
    if kind == "file":
        path.write_text("no socket")
    elif kind == "symlink":
        path.symlink_to(directory.parent / "elsewhere" / "engine.sock")
    [line] = reports.send([handle(1)])
    assert "no such engine" in line
    with pytest.raises(TimeoutError):
        listener.accept()


def test_another_users_socket_is_not_connected_to(
    reports: CancelReports,
    directory: Path,
    open_inbox: Callable[[Path], zmq.Socket[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_inbox(directory / ENGINE)
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    [line] = reports.send([handle(1)])
    assert "no such engine" in line
