"""A frontend's sockets, and the engine process at their other end: found or started, and watched until it ends. Knows
nothing of requests."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from typing import NamedTuple

import msgspec
import zmq

from gptj_triton.engine.config import EngineConfig
from gptj_triton.errors import ConfigError
from gptj_triton.process import messages
from gptj_triton.process.directory import EngineDirectory
from gptj_triton.process.heartbeat import TICK_SECONDS, HeartbeatWatch
from gptj_triton.process.start import EngineStarter, TooEarlyError

TICK_MS = int(TICK_SECONDS * 1000)

log = logging.getLogger("gptj_triton")


class Events(NamedTuple):
    """What a frontend waits for: a message of the engine, its own end, the engine's."""

    message: bool
    closing: bool
    ended: bool


class EngineConnection:
    """For one thread, which may change; `send` and `interrupt` are for any thread, but `send` for one at a time."""

    def __init__(self, config: EngineConfig, server_pid: int, name: str, engine_module: str, model: str) -> None:
        """The arguments are those of EngineClient."""
        self.directory = EngineDirectory.of(config, server_pid)
        self.directory.make()
        self.is_closing = False  # no engine is looked or waited for any more
        self._server_pid = server_pid
        self._name = name
        self._model = model
        self._step_timeout = config.step_timeout
        self._starter = EngineStarter(config, self.directory, server_pid, engine_module)
        self._pidfd = -1
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[messages.ToFrontend] = msgspec.msgpack.Decoder(messages.ToFrontend)
        self._context = zmq.Context()
        self._address = f"ipc://{self.directory.frontend_socket(name)}"
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        with self.directory.locked():  # nobody may remove the directory now
            self._inbox.bind(self._address)
            self.directory.frontend_socket(name).chmod(0o600)
        self._wake_receiver, self._woken = self._wake_pair()
        self._outbox = self._context.socket(zmq.PUSH)

    def send(self, message: messages.ToEngine) -> None:
        self._outbox.send(self._encoder.encode(message))

    def receive(self) -> messages.ToFrontend:
        """The next message, which must be there."""
        return self._decoder.decode(self._inbox.recv())

    @property
    def has_message(self) -> bool:
        return bool(self._inbox.poll(0))

    def connect(self) -> messages.Welcome | None:
        """Find or start the engine and be welcomed; tries once more if the one it found was about to end. None if this
        frontend closes instead. Raises ConfigError with the engine's own words when it cannot start.
        """
        for _ in range(2):
            if not self._find_or_start():
                return None
            self._outbox.close(linger=0)
            self._outbox = self._context.socket(zmq.PUSH)
            self._outbox.set_hwm(0)
            self._outbox.connect(self.directory.engine_address)
            self.send(messages.Hello(self._name, self._model, os.getpid(), self._server_pid, self._address))
            welcome = self._await_welcome()
            if welcome is not None or self.is_closing:
                return welcome
            with contextlib.suppress(FileNotFoundError):
                raise ConfigError(self.directory.error_file.read_text(encoding="utf-8"))
        raise ConfigError("the engine process ended while it started; its log says more")

    def wait(self) -> Events:
        """What there is to do, once there is something, or after a tick."""
        events = dict(self._poller.poll(TICK_MS))
        return Events(self._inbox in events, self._woken in events, self._pidfd in events)

    def sleep(self, seconds: float) -> None:
        """Return after that time, or at once if this frontend closes."""
        self._woken.poll(math.ceil(seconds * 1000))

    def end_engine_for(self, problem: str | None) -> bool:
        """End the engine if it has a problem; whether it had to be."""
        if problem is None:
            return False
        log.error("the engine process is ended: %s", problem)
        with contextlib.suppress(ProcessLookupError):  # another frontend has ended it
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        return True

    def await_end(self) -> None:
        """Return when the engine, which may be one that was killed, has ended, or this frontend closes."""
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        poller.register(self._pidfd, zmq.POLLIN)
        poller.poll()
        os.close(self._pidfd)

    def interrupt(self) -> None:
        """Wake the thread that waits, once `is_closing`."""
        self._wake_receiver.send(b"")

    def leave(self, linger: int) -> None:
        """Close all sockets, taking `linger` ms to send what waits; the last to leave removes the directory."""
        self._context.destroy(linger)
        self.directory.remove_frontend_files(self._name)  # ZeroMQ leaves the socket
        self.directory.remove_if_unused()

    def _wake_pair(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Two ends of a pipe within this process."""
        receiving, sending = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        receiving.bind("inproc://wake")
        sending.connect("inproc://wake")
        return sending, receiving

    def _find_or_start(self) -> bool:
        """Set the pidfd of an engine, as soon as one may be started; false if this frontend closes instead."""
        while not self.is_closing:
            try:
                self._pidfd = self._starter.find_or_start()
            except TooEarlyError as error:
                self.sleep(error.seconds)
            else:
                self._poller = zmq.Poller()
                for readable in (self._inbox, self._woken, self._pidfd):
                    self._poller.register(readable, zmq.POLLIN)
                return True
        return False

    def _await_welcome(self) -> messages.Welcome | None:
        """The engine's welcome, however long it takes to load; None if it ended or this frontend closes instead."""
        watch: HeartbeatWatch | None = None
        while not (events := self.wait()).closing:
            if events.message:
                message = self.receive()
                if isinstance(message, messages.Welcome):
                    return message
            elif events.ended:
                break
            elif watch is not None:
                self.end_engine_for(watch.look())
            else:
                with contextlib.suppress(OSError):  # it has just begun
                    watch = HeartbeatWatch(self.directory.heartbeat, self._step_timeout)
        os.close(self._pidfd)
        return None
