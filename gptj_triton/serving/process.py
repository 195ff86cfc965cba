"""One tritonserver as a child of this process. Does not know what is served, nor when it is to be started again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.hidden_arguments import Argument, start
from gptj_triton.serving.limits import limit_server
from gptj_triton.serving.relay import Relay
from gptj_triton.serving.signals import pause, unblock_signals

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

POLL_SECONDS = 0.1


class TritonProcess:
    """A started tritonserver; its output goes to `relay`."""

    def __init__(self, command: Sequence[Argument], environment: Mapping[str, str], relay: Relay) -> None:
        """ServeError where the program cannot be started."""
        self._relay = relay
        relay.forget()
        try:
            self._process = start(
                command,
                lambda: prepare_child(command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=relay.outlet,
                stderr=relay.outlet,
                # Its own session, so that Ctrl-C in a terminal reaches it through the launcher only.
                start_new_session=True,
            )
        except OSError as error:
            raise ServeError(f"{command[0]}: {error.strerror or error}") from None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def has_ended_in_order(self) -> bool:
        return self._process.poll() == 0

    def why_ended(self) -> str:
        """One line, once it has ended."""
        status = self._process.wait()
        if status < 0:
            return f"tritonserver was ended by {signal.Signals(-status).name}"
        return f"tritonserver ended with status {status}: {self._relay.last_words}"

    def terminate(self) -> None:
        """Asks it to stop in order."""
        self._process.terminate()

    def ends_in_order(self, seconds: float) -> bool:
        """Whether it has, within that time, answered all and ended. StopRequestedError where a signal to stop comes."""
        deadline = time.monotonic() + seconds
        while not self.has_ended and time.monotonic() < deadline:
            pause(POLL_SECONDS)
        return self.has_ended_in_order

    def kill(self) -> None:
        """Ends it, in whatever state it is, and collects its status."""
        self._process.kill()
        self._process.wait()


def adopt_orphans() -> None:
    """From here on all descendants of this process whose parents end become its children (a Linux subreaper)."""
    call_prctl(PR_SET_CHILD_SUBREAPER, 1)


def prepare_child(command: Sequence[Argument]) -> None:
    """Runs in the child before `command`: it is told to stop when the launcher is killed, its signals arrive, and its
    limits hold."""
    call_prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    unblock_signals()
    limit_server(command)


def call_prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def reap(except_for: int | None = None) -> None:
    """Collects the exit statuses of adopted children that have ended, but not that of `except_for`."""
    for child in psutil.Process().children():
        if child.pid != except_for:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)


def end_children(seconds: float, spare: Callable[[], set[int]] = set) -> None:
    """Gives this process's children that long to end by themselves, then kills them; returns when there are none but
    those in `spare()`."""
    deadline = time.monotonic() + seconds
    while True:
        reap()
        left = {child.pid for child in psutil.Process().children()} - spare()
        if not left:
            return
        if time.monotonic() >= deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
