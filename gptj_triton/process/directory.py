"""The directory in which an engine and those that use it meet: its sockets, its lock, its process id."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path


def server_directory(server_pid: int) -> Path:
    """Where the engines of one server have their directories, one a configuration."""
    return Path(tempfile.gettempdir()) / f"gptj-engine-{server_pid}"


def remove_if_empty(directory: Path) -> None:
    """Remove the directory of an engine's sockets, and its parent, unless somebody still has a file there."""
    with contextlib.suppress(OSError):
        directory.rmdir()
        directory.parent.rmdir()
