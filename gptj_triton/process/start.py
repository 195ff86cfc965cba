"""Starts an engine process for the frontends of a server: one at a time, and more and more rarely while none comes up.

How often it was tried stands in the engine's directory, so all frontends together keep to one pace.
"""

from __future__ import annotations

import os
import subprocess
import time

import msgspec

from gptj_triton.engine.config import EngineConfig, cpu_settings
from gptj_triton.errors import ConfigError
from gptj_triton.process.directory import EngineDirectory, owner_pid, write_private

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds


class TooEarlyError(Exception):
    """The next start is due in so many `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Attempts(msgspec.Struct):
    """The starts since an engine last worked; `next_at` (CLOCK_MONOTONIC) is known when the last one has failed."""

    count: int = 0
    next_at: float | None = None

    def pause(self) -> float:
        """Seconds to wait after the last one failed."""
        return float(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self.count - 1, 16)))


class EngineStarter:
    """Finds the engine of a directory, or starts it."""

    def __init__(self, config: EngineConfig, directory: EngineDirectory, server_pid: int, engine_module: str) -> None:
        self._config = config
        self._directory = directory
        self._server_pid = server_pid
        self._owner_pid = owner_pid(server_pid)
        self._engine_module = engine_module
        self._child: subprocess.Popen[bytes] | None = None

    def find_or_start(self) -> int:
        """A pidfd of the running engine; starts one if there is none.

        Raises TooEarlyError while starts fail and the next one is not due, ConfigError where the program cannot be run.
        """
        directory = self._directory
        if self._child is not None:
            self._child.poll()  # it may be a zombie
        with directory.locked():
            pidfd = directory.open_engine()
            if pidfd is not None:
                return pidfd
            self._count_attempt()
            directory.remove_engine_files()
            directory.error_file.unlink(missing_ok=True)
            try:
                self._child = self._start()
            except OSError as error:
                program = self._config.engine_python
                raise ConfigError(f"the engine cannot be started with {program}: {error.strerror}") from None
            try:
                write_private(directory.pid_file, str(self._child.pid))
            except OSError:  # a full disk; nobody could find this engine
                self._child.kill()
                raise
            return os.pidfd_open(self._child.pid)

    def _count_attempt(self) -> None:
        file = self._directory.attempts_file
        try:
            attempts = msgspec.json.decode(file.read_bytes(), type=Attempts)
        except (FileNotFoundError, msgspec.DecodeError):
            attempts = Attempts()
        now = time.monotonic()
        if attempts.count and attempts.next_at is None:  # this is the first look since it failed
            attempts.next_at = now + attempts.pause()
            write_private(file, msgspec.json.encode(attempts).decode())
        # A file of a machine that was started again since then has moments of another clock.
        if attempts.next_at is not None and 0 < attempts.next_at - now <= attempts.pause():
            raise TooEarlyError(attempts.next_at - now)
        write_private(file, msgspec.json.encode(Attempts(attempts.count + 1)).decode())

    def _start(self) -> subprocess.Popen[bytes]:
        command = [self._config.engine_python, "-m", self._engine_module, "--config", self._config.to_json()]
        command += ["--directory", str(self._directory.path)]
        command += ["--server-pid", str(self._server_pid), "--owner-pid", str(self._owner_pid)]
        package = self._directory.link_package()
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        environment = cpu_settings(self._config.tensor_para_size) | os.environ | {"PYTHONPATH": path}
        # Python imports from the current directory first, so that is one of ours.
        return subprocess.Popen(command, cwd=package, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
