"""Runs one tritonserver, and ends all processes that it starts: stubs, the engine. Does not know what is served.

The process that runs this must be single-threaded when it starts the server. From then on it handles SIGINT, SIGTERM
and SIGHUP by waiting for them, and orphans of the server become its children (a Linux subreaper), so that none escapes,
however the server died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NoReturn

import psutil
import requests

from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.hidden_arguments import Argument, start
from gptj_triton.serving.limits import limit_server

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
    STOP_SIGNALS.add(signal.SIGHUP)
WATCHED_SIGNALS = {*STOP_SIGNALS, signal.SIGCHLD}
POLL_SECONDS = 0.1
HTTP_SECONDS = 5.0
# tritonserver counts its own exit timeout in steps of a second; after that it is killed.
EXTRA_STOP_SECONDS = 5.0
# The engine ends by itself within this time after tritonserver did, however that ended; stubs may hang for ever.
ORPHAN_SECONDS = 1.0
# An error as tritonserver logs it ("E1122 20:58:29.018764 7996 main.cc:257] "), as it prints it, as getopt or ld.so do.
COMPLAINT = re.compile(r"(?:E\d{4} .*?\] |error: |\S*tritonserver: )(?P<cause>.+)")
LOADED = re.compile(r"successfully loaded '(?P<model>[^']+)'")


class StopRequestedError(Exception):
    """A signal to stop came; `signal_number` is which."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class TritonProcess:
    """A started tritonserver. `wait_until_ready` and `wait` raise StopRequestedError when the user stops the launcher,
    and ServeError when the server fails; whatever happened, `stop` must follow."""

    def __init__(
        self,
        command: Sequence[Argument],
        environment: Mapping[str, str],
        stdin: BinaryIO,
        exit_timeout: float,
        headers: Mapping[str, str],
    ) -> None:
        """`stdin` becomes the server's standard input; it does not read it. `headers` open its administrative APIs."""
        self._headers = headers
        self._stop_seconds = exit_timeout + EXTRA_STOP_SECONDS
        self._complaint = ""
        self._last_line = ""
        self._loaded: set[str] = set()
        call_prctl(PR_SET_CHILD_SUBREAPER, 1)
        # Blocked from here on, so that a signal is neither lost nor raised in the middle of a clean-up.
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED_SIGNALS)
        try:
            self._process = start(
                command,
                lambda: prepare_child(command),
                env=environment,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Its own session, so that Ctrl-C in a terminal reaches it through the launcher only.
                start_new_session=True,
            )
        except OSError as error:
            raise ServeError(f"{command[0]}: {error.strerror or error}") from None
        self._relay = threading.Thread(target=self._relay_output, daemon=True)
        self._relay.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, url: str, models: Sequence[str], seconds: float) -> None:
        """Returns when every model is ready; ServeError names those of `models` that are not after so many seconds."""
        deadline = time.monotonic() + seconds
        with requests.Session() as session:
            session.trust_env = False  # a proxy has no business between here and our own child
            session.headers.update(self._headers)
            session.headers["Connection"] = "close"  # a connection left open holds tritonserver up when it is to stop
            while not self._answers(session, url):
                self._wait_for_signal(POLL_SECONDS)
                if time.monotonic() > deadline:
                    missing = ", ".join(model for model in models if model not in self._loaded)
                    raise ServeError(f"not ready within {seconds:g} s (--start-timeout): {missing or 'tritonserver'}")
        self._wait_for_signal(0.0)  # it was our own server that answered only if that still lives

    def _answers(self, session: requests.Session, url: str) -> bool:
        """True when all is ready, False while nothing answers; ServeError when a model failed. tritonserver opens its
        ports when it has tried to load every model."""
        try:
            if session.get(f"{url}/v2/health/ready", timeout=HTTP_SECONDS).ok:
                return True
            index = session.post(f"{url}/v2/repository/index", timeout=HTTP_SECONDS)
        except requests.RequestException:
            return False
        # The user's own options for tritonserver may close the index to us.
        raise ServeError(why_not_ready(index.json()) if index.ok else f"not every model is ready: {self._complaint}")

    def wait(self) -> NoReturn:
        """Waits until the server dies or the user stops the launcher."""
        while True:
            self._wait_for_signal(None)

    def stop(self) -> None:
        """Stops the server, kills it on a second signal or when it takes too long, and removes what is left of it."""
        if self._process.poll() is None:
            say("stopping; a second signal kills")
            self._process.terminate()
        deadline = time.monotonic() + self._stop_seconds
        while self._process.poll() is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or next_signal(min(remaining, 1.0)) in STOP_SIGNALS:
                self._process.kill()
                self._process.wait()
        end_orphans(ORPHAN_SECONDS)
        self._relay.join(timeout=ORPHAN_SECONDS)

    def _wait_for_signal(self, seconds: float | None) -> None:
        """Waits for a signal, at most that long, and raises what it means."""
        received = next_signal(seconds)
        if received in STOP_SIGNALS:
            raise StopRequestedError(received)
        if self._process.poll() is not None:
            raise ServeError(self._why_ended(self._process.returncode))
        reap(own_children(except_for=self.pid))

    def _why_ended(self, status: int) -> str:
        self._relay.join(timeout=ORPHAN_SECONDS)
        if status < 0:
            return f"tritonserver was ended by {signal.Signals(-status).name}"
        cause = self._complaint or self._last_line or "without a word"
        return f"tritonserver ended with status {status}: {cause}"

    def _relay_output(self) -> None:
        """Copies the server's output to stderr and remembers the last error in it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(OSError):  # nobody listens any more, but the server must not wait for that
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
            text = line.decode(errors="replace").strip()
            self._last_line = text or self._last_line
            if loaded := LOADED.search(text):
                self._loaded.add(loaded["model"])
            complaint = COMPLAINT.match(text)
            if complaint:
                self._complaint = complaint["cause"].strip('" ')


def next_signal(seconds: float | None) -> int | None:
    """The next of the watched signals, or None when none came in time."""
    received = signal.sigwaitinfo(WATCHED_SIGNALS) if seconds is None else signal.sigtimedwait(WATCHED_SIGNALS, seconds)
    return None if received is None else received.si_signo


def why_not_ready(models: Sequence[Mapping[str, str]]) -> str:
    """One line from the repository index [{"name", "version", "state", "reason"}]; an ensemble whose step failed has no
    reason of its own."""
    reasons = {model["name"]: model["reason"] for model in models if model.get("reason", "unloaded") != "unloaded"}
    if not reasons:
        missing = ", ".join(model["name"] for model in models if model.get("state") != "READY")
        return f"not ready, and Triton gives no reason: {missing}"
    # What follows is the stub's traceback, which stands in the log above.
    return "; ".join(f"model {name} cannot be loaded: {reason.split('At:')[0]}" for name, reason in reasons.items())


def call_prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def prepare_child(command: Sequence[Argument]) -> None:
    """Runs in the child before `command`: it is told to stop when the launcher is killed, its signals arrive, and its
    limits hold."""
    call_prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED_SIGNALS)
    limit_server(command)


def own_children(except_for: int | None = None) -> list[int]:
    """Process ids of this process's children, zombies included."""
    return [child.pid for child in psutil.Process().children() if child.pid != except_for]


def reap(children: Sequence[int]) -> None:
    """Collects the exit statuses of those that have ended; does not wait for the others."""
    for pid in children:
        os.waitpid(pid, os.WNOHANG)


def end_orphans(seconds: float) -> None:
    """Gives adopted processes that long to end by themselves, then kills them; returns when there are none."""
    deadline = time.monotonic() + seconds
    while children := own_children():
        if time.monotonic() > deadline:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        reap(children)
        time.sleep(0.02)


def say(message: str) -> None:
    """Writes a line to stderr, if that is still there: the terminal may be gone."""
    with contextlib.suppress(OSError):
        print(f"serve.py: {message}", file=sys.stderr, flush=True)
