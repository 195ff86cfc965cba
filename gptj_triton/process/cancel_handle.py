"""Cancel handles: bytes with which another process of this server can cancel a request.

A handle is MessagePack: the name of the engine's directory, which lies in the server's own, and the message to send. It
has no address, so it cannot lead anywhere else.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

import msgspec

from gptj_triton.process import messages
from gptj_triton.process.directory import is_private

LONGEST_HANDLE = 512  # bytes; ours have about 80


class CancelHandle(msgspec.Struct, tag="cancel_handle", forbid_unknown_fields=True):
    """`engine` names the directory of the engine's sockets within its server's: 12 hexadecimal digits."""

    engine: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{12}\Z")]
    cancel: messages.Cancel


def make_handle(engine: str, cancel: messages.Cancel) -> bytes:
    """The handle for a request of the engine whose directory has that name."""
    return msgspec.msgpack.encode(CancelHandle(engine, cancel))


def read_handle(handle: bytes) -> CancelHandle:
    """The handle that the bytes are; msgspec.DecodeError for anything that `make_handle` does not make."""
    if len(handle) > LONGEST_HANDLE:
        raise msgspec.DecodeError("a cancel handle is too long")
    return msgspec.msgpack.decode(handle, type=CancelHandle)


def find_socket(server_directory: Path, engine: str) -> Path | None:
    """The socket of an engine of this server; None unless it is this user's, where nobody else can put one."""
    path = server_directory / engine / "engine.sock"
    try:
        status = path.lstat()
        is_ours = stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid()
        return path if is_ours and is_private(path.parent) and is_private(server_directory) else None
    except OSError:
        return None
