"""The directory in which an engine and its frontends meet, and where it lies. Only this user can look into it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from gptj_triton.engine.config import EngineConfig
from gptj_triton.errors import ConfigError
from gptj_triton.pidfd import open_pidfd
from gptj_triton.process.temporary import temporary_directory

PACKAGE = Path(__file__).resolve().parents[1]
RUN_VARIABLE = "GPTJ_TRITON_RUN"  # the environment variable with the launcher's directory


def owner_pid(server_pid: int) -> int:
    """The process that the engines of this server end with: the launcher, or the server itself where there is none."""
    run = os.environ.get(RUN_VARIABLE)
    if not run:
        return server_pid
    try:
        check_private(Path(run))
        return int((Path(run) / "launcher.pid").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"environment variable {RUN_VARIABLE} is {run!r}, which no launcher made: {error}") from None


def server_directory(server_pid: int) -> Path:
    """Where all engines of one server have their directories."""
    run = os.environ.get(RUN_VARIABLE)
    return Path(run) / "engines" if run else temporary_directory() / f"gptj-engine-{server_pid}"


def make_private(path: Path) -> None:
    """Make a directory that only this user can look into; ConfigError where there is one that is not so."""
    try:
        path.mkdir(mode=0o700)
        path.chmod(0o700)  # whatever the umask
    except FileExistsError:
        check_private(path)


def check_private(path: Path) -> None:
    """ConfigError unless the path is a directory, and no link, of this user that others have no right to."""
    if not is_private(path):
        allowed = "a directory of this user with mode 0700; remove it, or set TMPDIR to a directory of your own"
        raise ConfigError(f"{path} belongs to another user, or others may use it; expected {allowed}")


def is_private(path: Path) -> bool:
    """Whether the path is a directory, and no link, of this user that others have no right to."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, whatever the umask; who reads it meets the whole text or none."""
    unfinished = path.with_name(f"{path.name}.new")
    with unfinished.open("w", encoding="utf-8", errors="replace") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
    unfinished.rename(path)


class EngineDirectory:
    """The files of the engine of one server and one configuration. Both sides create what is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = path / "engine.sock"  # where the engine receives
        self.pid_file = path / "engine.pid"
        self.error_file = path / "error.txt"  # why the engine could not start
        self.attempts_file = path / "attempts"  # how often it was started since it last worked
        self.heartbeat = path / "heartbeat"
        self.drained_file = path / "drained"  # what became of the last requests

    @classmethod
    def of(cls, config: EngineConfig, server_pid: int) -> EngineDirectory:
        digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:12]
        return cls(server_directory(server_pid) / digest)

    @property
    def engine_address(self) -> str:
        """The ZeroMQ endpoint that the engine receives at."""
        return f"ipc://{self.socket}"

    def frontend_socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def ready_file(self, name: str) -> Path:
        """Is there as long as the frontend has an engine that works and takes requests."""
        return self.path / f"{name}.ready"

    def make(self) -> None:
        """Make what is missing; ConfigError where another user was there first."""
        while True:
            make_private(self.path.parent)
            with contextlib.suppress(FileNotFoundError):  # the last engine's frontends removed the parent just now
                return make_private(self.path)

    def link_package(self) -> Path:
        """A directory for PYTHONPATH that holds this package and none of its dependencies, for any interpreter."""
        (self.path / PACKAGE.name).unlink(missing_ok=True)
        (self.path / PACKAGE.name).symlink_to(PACKAGE)
        return self.path

    def open_engine(self) -> int | None:
        """A pidfd of the running engine; None if there is none."""
        try:
            pid = int(self.pid_file.read_text())
            pidfd = open_pidfd(pid)
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        if pidfd is not None and os.fsencode(self.path) not in arguments:  # an engine's number that is another's now
            os.close(pidfd)
            return None
        return pidfd

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time starts the engine, or removes files of processes that have ended."""
        path = self.path / "lock"
        while True:
            self.make()
            with path.open("w") as file:
                os.fchmod(file.fileno(), 0o600)
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.exists() and path.samefile(f"/proc/self/fd/{file.fileno()}"):
                    yield
                    return
            # somebody removed the file while this process waited for it

    def remove_engine_files(self) -> None:
        """Remove the part of an engine that ends or has ended, under the lock."""
        for path in (self.socket, self.pid_file, self.heartbeat, self.path / PACKAGE.name):
            path.unlink(missing_ok=True)

    def remove_frontend_files(self, name: str) -> None:
        """Remove the part of a frontend that ends or has ended."""
        for path in (self.ready_file(name), self.frontend_socket(name)):
            path.unlink(missing_ok=True)

    def remove_dead_frontends(self) -> None:
        """Remove what frontends left that ended when no engine watched them."""
        with self.locked():  # no frontend is between making its socket and listening
            for path in self.path.glob("*.sock"):
                if path != self.socket and not _is_listening(path):
                    self.remove_frontend_files(path.stem)

    def remove_if_unused(self) -> None:
        """Remove the directory, and its parent if it was the last, unless an engine or a frontend uses it."""
        with self.locked():
            pidfd = self.open_engine()
            if pidfd is not None:
                os.close(pidfd)
            elif not any(path != self.socket for path in self.path.glob("*.sock")):
                shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def remove_server_directory(self) -> None:
        """Remove all files of all engines of this server, which has ended."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


def _is_listening(path: Path) -> bool:
    """Whether a process receives at the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as knock:
        try:
            knock.connect(str(path))
        except BlockingIOError:
            return True  # so many connect that this one would have to wait
        except OSError:
            return False
    return True
