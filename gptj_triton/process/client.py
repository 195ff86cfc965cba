"""A door's side of the engine: starts the engine process or joins it, sends requests, hands answers back. Loads no
torch.

All doors of one server with equal settings share one engine: a file lock decides who starts it. When the engine dies,
every request under way is answered with an error and a new engine is started; until that is ready, `submit` raises.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec
import zmq

from gptj_triton.engine.config import EngineConfig, cpu_settings
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import ConfigError, UnavailableError
from gptj_triton.pidfd import open_pidfd
from gptj_triton.process import messages
from gptj_triton.process.cancel_handle import make_handle
from gptj_triton.process.directory import remove_if_empty, server_directory

Answer: TypeAlias = messages.Finished | messages.Refused
OnAnswer: TypeAlias = Callable[[Answer], None]
OnTokens: TypeAlias = Callable[[messages.NewTokens], None]

# For late words of an engine that died, whose requests have been answered with an error.
_NOBODY: tuple[OnAnswer, OnTokens | None] = (lambda answer: None, None)
PACKAGE_PARENT = Path(__file__).resolve().parents[2]
ENGINE_DIED = "the engine process ended unexpectedly; a new one is being started, please try again"

log = logging.getLogger("gptj_triton")


def engine_directory(config: EngineConfig, server_pid: int) -> Path:
    """Where the engine of one server and one configuration has its sockets."""
    digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:12]
    return server_directory(server_pid) / digest


class EngineClient:
    """Requests go out from the thread that calls `submit`; answers arrive on a thread of this class."""

    def __init__(self, config: EngineConfig, server_pid: int, name: str) -> None:
        """Join the engine, starting it if it is not there; returns when its model is loaded.

        `server_pid` is the process the engine must end with, `name` is unique among the doors of that server. Raises
        ConfigError with the engine's own words when it cannot start.
        """
        self._config = config
        self._server_pid = server_pid
        self._name = name
        self.load = messages.Load(0, 0, 0, 0)  # the engine's last word on it
        self._directory = engine_directory(config, server_pid)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages.ToDoor)
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[OnAnswer, OnTokens | None]] = {}
        self._lock = threading.Lock()  # guards _pending, _ready and the use of _outbox
        self._ready = False
        self._unavailable = "the engine is not ready yet; please try again"
        self._closing = False

        self._context = zmq.Context()
        self._address = f"ipc://{self._directory}/{name}.sock"
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(self._address)
        self._wake_receiver, self._woken = self._wake_pair()
        self._outbox = self._context.socket(zmq.PUSH)
        try:
            self.model = self._connect()
        except BaseException:
            self._leave_directory(linger=0)
            raise
        self._ready = True
        self._receiver = threading.Thread(target=self._receive, name="engine-answers", daemon=True)
        self._receiver.start()

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_answer: OnAnswer,
        on_tokens: OnTokens | None = None,
        timeout: float = 0.0,
    ) -> int:
        """Send a request; `on_answer` is called exactly once, on another thread. Returns the number to cancel it by.

        With `on_tokens` the request is streamed: it is called before that, on the same thread, as tokens come. After
        `timeout` seconds, unless 0, the request ends with finish reason "timeout". Raises UnavailableError while there
        is no engine.
        """
        with self._lock:
            if not self._ready:
                raise UnavailableError(self._unavailable)
            number = next(self._numbers)
            self._pending[number] = on_answer, on_tokens
            self._send(messages.Submit(self._name, number, prompt, params, on_tokens is not None, timeout))
        return number

    def cancel_handle(self, number: int) -> bytes:
        """What lets other processes of this server cancel a request."""
        return make_handle(self._directory, messages.Cancel(self._name, number))

    def cancel(self, number: int) -> None:
        """End a request early; its answer has finish reason "cancelled". Nothing happens if it has ended."""
        with self._lock:
            if self._ready:
                self._send(messages.Cancel(self._name, number))

    def close(self) -> None:
        """Leave the engine, which ends if this was its last door. Requests under way are answered with an error."""
        with self._lock:
            self._closing = True
            if self._ready:
                self._send(messages.Goodbye(self._name))
            self._ready = False
        self._wake_receiver.send(b"")
        self._receiver.join()
        self._fail_pending("the server is shutting down")
        self._leave_directory(linger=1000)

    def _leave_directory(self, linger: int) -> None:
        """Close all sockets, taking `linger` ms to send what waits; the last to leave removes the directory."""
        self._context.destroy(linger)
        (self._directory / f"{self._name}.sock").unlink(missing_ok=True)  # ZeroMQ leaves it
        remove_if_empty(self._directory)

    def _wake_pair(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Two ends of a pipe within this process."""
        receiving, sending = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        receiving.bind("inproc://wake")
        sending.connect("inproc://wake")
        return sending, receiving

    @property
    def _engine_address(self) -> str:
        return f"ipc://{self._directory}/engine.sock"

    def _send(self, message: messages.ToEngine) -> None:
        self._outbox.send(self._encoder.encode(message))

    def _connect(self) -> messages.Welcome:
        """Find or start the engine and be welcomed; tries once more if the one it found was about to end."""
        for _ in range(2):
            self._pidfd = self._find_or_start()
            self._outbox.close(linger=0)
            self._outbox = self._context.socket(zmq.PUSH)
            self._outbox.set_hwm(0)
            self._outbox.connect(self._engine_address)
            self._send(messages.Hello(self._name, os.getpid(), self._address))
            welcome = self._await_welcome()
            if welcome is not None:
                return welcome
            if self._closing:
                break
            error = self._directory / "error.txt"
            with contextlib.suppress(FileNotFoundError):
                reason = error.read_text()
                error.unlink(missing_ok=True)  # the other door may have read it at the same time
                raise ConfigError(reason)
        raise ConfigError("the engine process ended while it started; its log says more")

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        for readable in (self._inbox, self._woken, self._pidfd):
            poller.register(readable, zmq.POLLIN)
        return poller

    def _await_welcome(self) -> messages.Welcome | None:
        """The engine's welcome, however long it takes to load; None if it ended or this door closes instead."""
        poller = self._poller()
        while self._inbox in (events := dict(poller.poll())) and self._woken not in events:
            message = self._decoder.decode(self._inbox.recv())
            if isinstance(message, messages.Welcome):
                return message
        os.close(self._pidfd)
        return None

    def _find_or_start(self) -> int:
        """A pidfd of the running engine; starts one, under the lock, if there is none."""
        with self._locked():
            pid_file = self._directory / "engine.pid"
            if pid_file.exists():
                pidfd = open_pidfd(int(pid_file.read_text()))
                if pidfd is not None:
                    return pidfd
            (self._directory / "error.txt").unlink(missing_ok=True)
            command = [
                self._config.engine_python,
                "-m",
                "gptj_triton.process.server",
                "--config",
                self._config.to_json(),
            ]
            command += ["--directory", str(self._directory), "--server-pid", str(self._server_pid)]
            command += ["--door-pid", str(os.getpid())]
            path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
            environment = cpu_settings(self._config.tensor_para_size) | os.environ | {"PYTHONPATH": path}
            try:
                self._child = subprocess.Popen(
                    command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
                )
            except OSError as error:
                (self._directory / "lock").unlink()
                raise ConfigError(f"the engine cannot be started with {command[0]}: {error.strerror}") from None
            pid_file.write_text(str(self._child.pid))
            return os.pidfd_open(self._child.pid)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._directory / "lock"
        while True:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.exists() and path.samefile(f"/proc/self/fd/{file.fileno()}"):
                    yield
                    return
            # an engine that ended removed the file while this process waited for it

    def _receive(self) -> None:
        """Hand answers to their requests until this door closes, or the engine died and cannot be started again."""
        while True:
            poller = self._poller()
            while self._pidfd not in (events := dict(poller.poll())):
                if self._woken in events:
                    return
                self._dispatch(self._decoder.decode(self._inbox.recv()))
            if self._closing or not self._reconnect():
                return

    def _dispatch(self, message: messages.ToDoor) -> None:
        assert not isinstance(message, messages.Welcome)
        if isinstance(message, messages.Load):
            self.load = message
        elif isinstance(message, messages.Progress):
            for new in message.requests:
                _, on_tokens = self._pending.get(new.request, _NOBODY)
                if on_tokens is not None:
                    on_tokens(new)
        else:
            with self._lock:
                on_answer, _ = self._pending.pop(message.request, _NOBODY)
            on_answer(message)

    def _reconnect(self) -> bool:
        """After the engine died: answer what was under way, and start a new engine."""
        with self._lock:
            self._ready = False
        self.load = messages.Load(0, 0, 0, 0)
        os.close(self._pidfd)
        while self._inbox.poll(0):  # answers sent before it died count
            self._dispatch(self._decoder.decode(self._inbox.recv()))
        self._fail_pending(ENGINE_DIED)
        log.error("the engine process ended unexpectedly; starting a new one")
        try:
            self.model = self._connect()
        except ConfigError as error:
            self._unavailable = f"the engine ended and no new one could be started: {error}"
            log.error(self._unavailable)
            return False
        with self._lock:
            self._ready = not self._closing
        return True

    def _fail_pending(self, reason: str) -> None:
        with self._lock:
            failed, self._pending = self._pending, {}
        for number, (on_answer, _) in failed.items():
            on_answer(messages.Refused(number, reason, invalid=False))
