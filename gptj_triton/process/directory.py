"""The directory in which an engine and its frontends meet: sockets, lock, process id, and a link to this package."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gptj_triton.engine.config import EngineConfig
from gptj_triton.process.temporary import temporary_directory

PACKAGE = Path(__file__).resolve().parents[1]
RUN_VARIABLE = "GPTJ_TRITON_RUN"  # the environment variable with the launcher's directory


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
