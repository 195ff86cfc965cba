"""The directory in which an engine and its frontends meet: sockets, lock, process id, and a link to this package."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gptj_triton.engine.config import EngineConfig

PACKAGE = Path(__file__).resolve().parents[1]


# Triton starts a stub by a line for a shell, and does not quote the paths in it.
PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+,@%=-]+")
LONGEST_TEMPORARY = 60  # bytes; the path of a socket below it has 107 at most
OTHER_TEMPORARIES = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


def temporary_directory() -> Path:
    """Python's directory for temporary files, TMPDIR or /tmp, where its path suits Triton and sockets; else another.

    Raises OSError where there is none.
    """
    given = Path(tempfile.gettempdir()).absolute()
    for path in (given, *OTHER_TEMPORARIES):
        if is_plain(path) and len(str(path)) <= LONGEST_TEMPORARY and may_hold_programs(path):
            return path
    raise OSError(
        f"TMPDIR {str(given)!r} needs a path of at most {LONGEST_TEMPORARY} letters, digits and _ . / + , @ % = - on a "
        f"file system that may hold programs, and {', '.join(map(str, OTHER_TEMPORARIES))} do not serve either"
    )


def is_plain(path: Path) -> bool:
    """Whether a path means itself in a line for a shell."""
    return PLAIN_PATH.fullmatch(str(path)) is not None


def may_hold_programs(path: Path) -> bool:
    """Whether this user may write files there, and run them."""
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK) and not os.statvfs(path).f_flag & os.ST_NOEXEC


def server_directory(server_pid: int) -> Path:
    """Where all engines of one server have their directories."""
    return temporary_directory() / f"gptj-engine-{server_pid}"


class EngineDirectory:
    """The files of the engine of one server and one configuration. Both sides create what is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, config: EngineConfig, server_pid: int) -> EngineDirectory:
        digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:12]
        return cls(server_directory(server_pid) / digest)

    @property
    def engine_address(self) -> str:
        """The ZeroMQ endpoint that the engine receives at."""
        return f"ipc://{self.path}/engine.sock"

    @property
    def pid_file(self) -> Path:
        return self.path / "engine.pid"

    @property
    def error_file(self) -> Path:
        """Says why the engine could not start."""
        return self.path / "error.txt"

    def frontend_socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def link_package(self) -> Path:
        """A directory for PYTHONPATH that holds this package and none of its dependencies, for any interpreter."""
        (self.path / PACKAGE.name).unlink(missing_ok=True)
        (self.path / PACKAGE.name).symlink_to(PACKAGE)
        return self.path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time starts the engine, or removes its files."""
        path = self.path / "lock"
        while True:
            self.make()
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.exists() and path.samefile(f"/proc/self/fd/{file.fileno()}"):
                    yield
                    return
            # an engine that ended removed the file while this process waited for it

    def remove_engine_files(self) -> None:
        """Remove the engine's part, under the lock; the frontends' sockets stay."""
        for name in ("engine.sock", "engine.pid", PACKAGE.name, "lock"):
            (self.path / name).unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """Remove the directory, and its parent, unless somebody still has a file there."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
            self.path.parent.rmdir()

    def remove_server_directory(self) -> None:
        """Remove all files of all engines of this server, which has ended."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
