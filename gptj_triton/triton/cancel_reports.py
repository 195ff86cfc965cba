"""Asks the engines of this server to cancel requests whose clients left. Knows no requests, only their cancel handles.

A handle may come from anybody, so it names an engine of this server and nothing else: see process/cancel_handle.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import zmq

from gptj_triton.process.cancel_handle import find_socket, read_handle


class CancelReports:
    """Sends cancel messages to engines, for one thread. It never waits: what cannot be sent now is not sent."""

    def __init__(self, server_directory: Path) -> None:
        """`server_directory` holds the directories of this server's engines; no socket elsewhere is used."""
        self._server_directory = server_directory
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, handles: Iterable[bytes]) -> set[str]:
        """Send each handle's message to its engine; returns what went wrong, without repeating what a handle says."""
        for engine in [engine for engine in self._sockets if find_socket(self._server_directory, engine) is None]:
            self._sockets.pop(engine).close(linger=0)
        return {failure for handle in handles if (failure := self._send_one(handle)) is not None}

    def close(self) -> None:
        """Close all sockets; what could not be delivered so far is dropped."""
        self._context.destroy(linger=0)

    def _send_one(self, handle: bytes) -> str | None:
        try:
            known = read_handle(handle)
        except msgspec.DecodeError:
            return "a client left, but its cancel handle is none of this server's; nothing is cancelled"
        path = find_socket(self._server_directory, known.engine)
        if path is None:
            return "a client left, but this server has no such engine as its cancel handle names; nothing is cancelled"
        try:
            self._connected(known.engine, path).send(self._encoder.encode(known.cancel), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return f"a client left, but its engine cannot be asked to cancel its request: {error}"
        return None

    def _connected(self, engine: str, path: Path) -> zmq.Socket[bytes]:
        if engine not in self._sockets:
            socket = self._context.socket(zmq.PUSH)
            self._sockets[engine] = socket
            socket.connect(f"ipc://{path}")
        return self._sockets[engine]
