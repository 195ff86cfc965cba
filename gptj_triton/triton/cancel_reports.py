"""Reports requests whose clients left to whoever generates for them.

A handle says where to and what: a ZeroMQ endpoint, a newline, and bytes that are sent as they are. Knows nothing of
what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable

import zmq


class CancelReports:
    """Sends handles' payloads to their addresses, for one thread. It never waits; who cannot be reached is not told."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._sockets: dict[bytes, zmq.Socket[bytes]] = {}

    def send(self, handles: Iterable[bytes]) -> list[str]:
        """Push each handle's payload; returns a line for each that could not be sent."""
        failures = []
        for handle in handles:
            address, _, payload = handle.partition(b"\n")
            try:
                self._socket(address).send(payload, zmq.NOBLOCK)
            except (ValueError, zmq.ZMQError) as error:
                failures.append(f"cannot report a client that left to {address!r}: {error}")
        return failures

    def close(self) -> None:
        """Close all sockets; what could not be delivered so far is dropped."""
        self._context.destroy(linger=0)

    def _socket(self, address: bytes) -> zmq.Socket[bytes]:
        if address not in self._sockets:
            socket = self._context.socket(zmq.PUSH)
            try:
                socket.connect(address.decode())
            except (ValueError, zmq.ZMQError):
                socket.close()
                raise
            self._sockets[address] = socket
        return self._sockets[address]
