"""A frontend's side of the engine: starts the engine process or joins it, sends requests, hands answers back. Loads no
torch.

All frontends of one server with equal settings share one engine; a file lock decides which of them starts it. When the
engine dies, every request in flight is answered with an error and a new engine is started; until that is ready,
`submit` raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import zmq

from gptj_triton.engine.config import EngineConfig, cpu_settings
from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import ConfigError, UnavailableError
from gptj_triton.pidfd import open_pidfd, process_has_ended
from gptj_triton.process import messages
from gptj_triton.process.cancel_handle import make_handle
from gptj_triton.process.directory import EngineDirectory


@dataclass(frozen=True)
class Failed:
    """The answer to a request that no engine finishes; `message` says why."""

    message: str


Answer: TypeAlias = messages.Finished | Failed
OnAnswer: TypeAlias = Callable[[Answer], None]
OnTokens: TypeAlias = Callable[[messages.TokenDelta], None]

# For late messages of an engine that died, whose requests have been answered with an error.
_NOBODY: tuple[OnAnswer, OnTokens | None] = (lambda answer: None, None)
ENGINE_DIED = "the engine process ended unexpectedly; a new one is being started, please try again"

log = logging.getLogger("gptj_triton")


class EngineClient:
    """Requests go out from the thread that calls `submit`; answers arrive on a thread of this class."""

    def __init__(
        self, config: EngineConfig, server_pid: int, name: str, engine_module: str = "gptj_triton.process.server"
    ) -> None:
        """Join the engine, starting it if it is not there; returns when its model is loaded.

        `server_pid` is the process that the engine must end with; `name` is unique among the frontends of that server;
        `engine_module` is run as the engine process. Raises ConfigError with the engine's own words when it cannot
        start.
        """
        self._config = config
        self._server_pid = server_pid
        self._name = name
        self._engine_module = engine_module
        self.reports: queue.SimpleQueue[EngineMetrics] = queue.SimpleQueue()  # of the engine's metrics, oldest first
        self._directory = EngineDirectory.of(config, server_pid)
        self._directory.make()
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages.ToFrontend)
        self._pending: dict[int, tuple[OnAnswer, OnTokens | None]] = {}
        self._lock = threading.Lock()  # guards _pending, _ready and the use of _outbox
        self._ready = False
        self._unavailable = "the engine is not ready yet; please try again"
        self._closing = False

        self._context = zmq.Context()
        self._address = f"ipc://{self._directory.frontend_socket(name)}"
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(self._address)
        self._wake_receiver, self._woken = self._wake_pair()
        self._outbox = self._context.socket(zmq.PUSH)
        try:
            self.engine_info = self._connect()
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
        client: messages.ClientRequest | None = None,
    ) -> int:
        """Send a request; `on_answer` is called exactly once, on another thread. Returns the number to cancel it by.

        With `on_tokens` the request is streamed: it is called before that, on the same thread, as tokens come. After
        `timeout` seconds, unless 0, the request ends with finish reason "timeout", or is refused if it was not begun.
        `client` is the client's request that it is of, where that is more than this one. Raises UnavailableError while
        there is no engine.
        """
        with self._lock:
            if not self._ready:
                raise UnavailableError(self._unavailable)
            number = secrets.randbits(63)  # nobody can guess it: a cancel handle carries it
            self._pending[number] = on_answer, on_tokens
            client = client or messages.ClientRequest(number, params.most_tokens(len(prompt)))
            self._send(messages.Submit(self._name, number, prompt, params, client, on_tokens is not None, timeout))
        return number

    def cancel_handle(self, number: int) -> bytes:
        """What lets other processes of this server cancel a request."""
        return make_handle(self._directory.path.name, messages.Cancel(self._name, number))

    def cancel(self, number: int) -> None:
        """End a request early; its answer has finish reason "cancelled". Nothing happens if it has ended."""
        with self._lock:
            if self._ready:
                self._send(messages.Cancel(self._name, number))

    def close(self) -> None:
        """Leave the engine, which ends if this was its last frontend. Requests in flight are answered with an error.

        A second call does nothing.
        """
        with self._lock:
            if self._closing:
                return
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
        self._directory.frontend_socket(self._name).unlink(missing_ok=True)  # ZeroMQ leaves it
        self._directory.remove_if_empty()

    def _wake_pair(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Two ends of a pipe within this process."""
        receiving, sending = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        receiving.bind("inproc://wake")
        sending.connect("inproc://wake")
        return sending, receiving

    def _send(self, message: messages.ToEngine) -> None:
        self._outbox.send(self._encoder.encode(message))

    def _connect(self) -> messages.Welcome:
        """Find or start the engine and be welcomed; tries once more if the one it found was about to end."""
        for _ in range(2):
            self._pidfd = self._find_or_start()
            self._outbox.close(linger=0)
            self._outbox = self._context.socket(zmq.PUSH)
            self._outbox.set_hwm(0)
            self._outbox.connect(self._directory.engine_address)
            self._send(messages.Hello(self._name, os.getpid(), self._address))
            welcome = self._await_welcome()
            if welcome is not None:
                return welcome
            if self._closing:
                break
            error = self._directory.error_file
            with contextlib.suppress(FileNotFoundError):
                reason = error.read_text(encoding="utf-8")
                error.unlink(missing_ok=True)  # another frontend may have read it at the same time
                raise ConfigError(reason)
        raise ConfigError("the engine process ended while it started; its log says more")

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        for readable in (self._inbox, self._woken, self._pidfd):
            poller.register(readable, zmq.POLLIN)
        return poller

    def _await_welcome(self) -> messages.Welcome | None:
        """The engine's welcome, however long it takes to load; None if it ended or this frontend closes instead."""
        poller = self._poller()
        while self._inbox in (events := dict(poller.poll())) and self._woken not in events:
            message = self._decoder.decode(self._inbox.recv())
            if isinstance(message, messages.Welcome):
                return message
        os.close(self._pidfd)
        return None

    def _find_or_start(self) -> int:
        """A pidfd of the running engine; starts one, under the lock, if there is none."""
        directory = self._directory
        with directory.locked():
            if directory.pid_file.exists():
                pidfd = open_pidfd(int(directory.pid_file.read_text()))
                if pidfd is not None:
                    return pidfd
            directory.error_file.unlink(missing_ok=True)
            try:
                self._child = self._start_engine()
            except OSError as error:
                directory.remove_engine_files()
                program = self._config.engine_python
                raise ConfigError(f"the engine cannot be started with {program}: {error.strerror}") from None
            directory.pid_file.write_text(str(self._child.pid))
            return os.pidfd_open(self._child.pid)

    def _start_engine(self) -> subprocess.Popen[bytes]:
        command = [self._config.engine_python, "-m", self._engine_module, "--config", self._config.to_json()]
        command += ["--directory", str(self._directory.path), "--server-pid", str(self._server_pid)]
        command += ["--frontend-pid", str(os.getpid())]
        package = self._directory.link_package()
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        environment = cpu_settings(self._config.tensor_para_size) | os.environ | {"PYTHONPATH": path}
        # Python imports from the current directory first, so that is one of ours.
        return subprocess.Popen(command, cwd=package, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)

    def _receive(self) -> None:
        """Hand answers to their requests until this frontend closes, or the engine died and cannot be started again."""
        while True:
            poller = self._poller()
            while self._pidfd not in (events := dict(poller.poll())):
                if self._woken in events:
                    return
                self._dispatch(self._decoder.decode(self._inbox.recv()))
            if self._closing or not self._reconnect():
                return

    def _dispatch(self, message: messages.ToFrontend) -> None:
        assert not isinstance(message, messages.Welcome)
        if isinstance(message, EngineMetrics):
            self.reports.put(message)
        elif isinstance(message, messages.Deltas):
            for delta in message.deltas:
                _, on_tokens = self._pending.get(delta.request, _NOBODY)
                if on_tokens is not None:
                    on_tokens(delta)
        else:
            with self._lock:
                on_answer, _ = self._pending.pop(message.request, _NOBODY)
            on_answer(Failed(message.message) if isinstance(message, messages.Refused) else message)

    def _reconnect(self) -> bool:
        """After the engine died: answer what was in flight, and start a new engine."""
        with self._lock:
            self._ready = False
        self.reports.put(EngineMetrics())
        os.close(self._pidfd)
        while self._inbox.poll(0):  # answers sent before it died count
            self._dispatch(self._decoder.decode(self._inbox.recv()))
        self._fail_pending(ENGINE_DIED)
        if process_has_ended(self._server_pid):
            return False  # and so will this process
        log.error("the engine process ended unexpectedly; starting a new one")
        try:
            self.engine_info = self._connect()
        except ConfigError as error:
            self._unavailable = f"the engine ended and no new one could be started: {error}"
            log.error(self._unavailable)
            return False
        log.warning("the new engine process, %d, is ready", self.engine_info.engine_pid)
        with self._lock:
            self._ready = not self._closing
        return True

    def _fail_pending(self, reason: str) -> None:
        with self._lock:
            failed, self._pending = self._pending, {}
        for on_answer, _ in failed.values():
            on_answer(Failed(reason))
