"""Closes the connections of another process of this user in order, from outside: tritonserver waits for idle ones when
it is to stop, and closes those that come meanwhile without an answer.

Linux only (pidfd_getfd, since 5.6). Where the kernel does not let us, a container's rules for example, nothing happens:
callers must not rely on it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Collection, Iterator

import psutil

SYS_PIDFD_GETFD = 438
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # one instruction of BPF: return 0
# struct tcp_info (linux/tcp.h): times in ms since data was sent and received, and bytes
TCP_INFO_BYTES, UNACKED, LAST_SENT, LAST_RECEIVED, RECEIVED, NOT_SENT = 148, 24, 44, 52, 128, 144
# What a server sends of an answer follows within this time. A stub that is silent for longer ends tritonserver anyway.
QUIET_MILLISECONDS = 1000


class Connections:
    """Those at the TCP `ports` of the process `pid`."""

    def __init__(self, pid: int, ports: Collection[int]) -> None:
        self._pid = pid
        self._ports = ports

    def refuse_new(self) -> None:
        """Whoever connects from now on gets no answer until the process has ended, and is refused then."""
        for listener in self._sockets(psutil.CONN_LISTEN):
            program = ctypes.create_string_buffer(DROP_ALL)
            filter_ = struct.pack("HP", 1, ctypes.addressof(program))
            with contextlib.suppress(OSError):  # a user namespace may forbid it
                listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)

    def close_idle(self) -> bool:
        """Ends what nobody waits at for an answer; the process then closes it. Whether none is left open."""
        all_closed = True
        for connection in self._sockets(psutil.CONN_ESTABLISHED):
            if is_idle(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)):
                connection.shutdown(socket.SHUT_RD)
            all_closed = False
        return all_closed

    def _sockets(self, state: str) -> Iterator[socket.socket]:
        with contextlib.suppress(OSError, psutil.Error):
            pidfd = os.pidfd_open(self._pid)
            try:
                for found in psutil.Process(self._pid).net_connections("tcp"):
                    if found.status == state and found.laddr.port in self._ports:
                        with (
                            contextlib.suppress(OSError),
                            socket.socket(fileno=take_descriptor(pidfd, found.fd)) as taken,
                        ):
                            yield taken
            finally:
                os.close(pidfd)


def is_idle(tcp_info: bytes) -> bool:
    """Whether all that was asked on a connection has been answered, and the answer has arrived."""

    def number(offset: int, kind: str = "I") -> int:
        return int(struct.unpack_from(kind, tcp_info, offset)[0])

    if number(RECEIVED, "Q") == 0:
        return True
    answered = QUIET_MILLISECONDS <= number(LAST_SENT) <= number(LAST_RECEIVED)
    return answered and number(UNACKED) == 0 and number(NOT_SENT) == 0


def take_descriptor(pidfd: int, descriptor: int) -> int:
    """A copy of another process's file descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    taken = int(libc.syscall(SYS_PIDFD_GETFD, pidfd, descriptor, 0))
    if taken < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return taken
