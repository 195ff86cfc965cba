"""The engine process: answers doors over ZeroMQ while the engine steps. Knows nothing of Triton but its process id.

    python -m gptj_triton.process.server --config JSON --directory DIR --server-pid PID --door-pid PID

It binds DIR/engine.sock, and ends after its last door left, or when the server ends, however that ends. If it cannot
start, DIR/error.txt says why.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec
import zmq

from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.sequence import Sequence
from gptj_triton.errors import EngineError, InvalidRequestError
from gptj_triton.pidfd import open_pidfd, when_ended
from gptj_triton.process import messages
from gptj_triton.process.directory import remove_if_empty
from gptj_triton.triton.stubs import end_orphaned_stubs

STUBS_END_BY_THEMSELVES = 0.5  # seconds in which they do, unless the server was killed
LOAD_INTERVAL = 0.1  # seconds between two reports of the load while the engine is busy

log = logging.getLogger("gptj_triton")


@dataclass(eq=False)
class Stream:
    """A streamed request: its sequence, and how many of its tokens the door was told of."""

    sequence: Sequence
    told: int = 0

    def news(self) -> messages.NewTokens | None:
        """What the door was not told of, which counts as told then."""
        start, self.told = self.told, len(self.sequence.output)
        if start == self.told:
            return None
        _, request = _address(self.sequence)
        log_probs = self.sequence.log_probs[start:] if self.sequence.params.is_return_log_probs else []
        return messages.NewTokens(request, self.sequence.output[start:], log_probs)


@dataclass(eq=False)
class Door:
    """A process that sends requests: where to answer, how to see that it died, and its requests under way.

    `socket` is the file it is answered at, which somebody must remove when it died.
    """

    outbox: zmq.Socket[bytes]
    pidfd: int
    socket: Path
    requests: set[int] = field(default_factory=set)
    streams: dict[int, Stream] = field(default_factory=dict)


class EngineServer:
    """Messages in, engine steps, messages out: one thread, one loop."""

    def __init__(self, directory: Path, first_door_pid: int) -> None:
        """Bind the socket in `directory`; `first_door_pid` is the process whose greeting is awaited."""
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(f"ipc://{directory}/engine.sock")
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._doors: dict[str, Door] = {}
        self._first_door_pid = first_door_pid
        self._deadlines: dict[Hashable, float] = {}
        self._load = messages.Load(0, 0, 0, 0)
        self._load_told = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages.ToEngine)

    def run(self, engine: Engine) -> None:
        """Serve until the last door left."""
        self._await_greeting()
        self._receive(engine, wait=False)
        while self._doors:
            self._receive(engine, wait=not engine.busy)
            self._end_what_is_due(engine)
            if engine.busy:
                for sequences in engine.step():
                    self._answer(sequences)
                self._tell_progress()
            self._tell_load(engine)

    def _await_greeting(self) -> None:
        """Return when a door has greeted, or the one that started this engine died before it could."""
        pidfd = open_pidfd(self._first_door_pid)
        if pidfd is not None:
            poller = zmq.Poller()
            poller.register(self._inbox, zmq.POLLIN)
            poller.register(pidfd, zmq.POLLIN)
            poller.poll()
            os.close(pidfd)

    def close(self) -> None:
        self._context.destroy(linger=1000)

    def _receive(self, engine: Engine, wait: bool) -> None:
        events = dict(self._poller.poll(None if wait else 0))
        dead = [door for door in self._doors.values() if door.pidfd in events]
        while self._inbox.poll(0):
            self._handle(engine, self._decoder.decode(self._inbox.recv()))
        for name, door in list(self._doors.items()):
            if door in dead:
                self._leave(engine, name)
                door.socket.unlink(missing_ok=True)

    def _handle(self, engine: Engine, message: messages.ToEngine) -> None:
        if isinstance(message, messages.Hello):
            self._join(engine, message)
        elif message.door not in self._doors:
            log.warning("message from a door that has left: %s", message.door)
        elif isinstance(message, messages.Submit):
            self._submit(engine, message)
        elif isinstance(message, messages.Cancel):
            cancelled = engine.cancel((message.door, message.request))
            if cancelled:
                self._answer(cancelled)
        else:
            self._leave(engine, message.door)

    def _join(self, engine: Engine, hello: messages.Hello) -> None:
        socket = Path(hello.address.removeprefix("ipc://"))
        pidfd = open_pidfd(hello.pid)
        if pidfd is None:
            socket.unlink(missing_ok=True)
            return
        outbox = self._context.socket(zmq.PUSH)
        outbox.set_hwm(0)
        outbox.connect(hello.address)
        self._doors[hello.door] = Door(outbox, pidfd, socket)
        self._poller.register(pidfd, zmq.POLLIN)
        welcome = messages.Welcome(os.getpid(), engine.limits, engine.model.start_id, engine.model.end_id)
        outbox.send(self._encoder.encode(welcome))
        outbox.send(self._encoder.encode(_load_of(engine)))

    def _submit(self, engine: Engine, submit: messages.Submit) -> None:
        door = self._doors[submit.door]
        try:
            sequence = Sequence((submit.door, submit.request), submit.prompt, submit.params)
            engine.submit(sequence)
        except InvalidRequestError as error:
            door.outbox.send(self._encoder.encode(messages.Refused(submit.request, str(error), invalid=True)))
        else:
            door.requests.add(submit.request)
            if submit.stream:
                door.streams[submit.request] = Stream(sequence)
            if submit.timeout:
                self._deadlines[sequence.key] = time.monotonic() + submit.timeout

    def _end_what_is_due(self, engine: Engine) -> None:
        now = time.monotonic()
        for key in [key for key, deadline in self._deadlines.items() if deadline <= now]:
            self._answer(engine.cancel(key, "timeout"))

    def _tell_progress(self) -> None:
        for door in self._doors.values():
            news = list(filter(None, [stream.news() for stream in door.streams.values()]))
            if news:
                door.outbox.send(self._encoder.encode(messages.Progress(news)))

    def _tell_load(self, engine: Engine) -> None:
        """Tell all doors of the engine's load if it has changed: at once when the engine falls idle."""
        now = time.monotonic()
        if engine.busy and now < self._load_told + LOAD_INTERVAL:
            return
        load = _load_of(engine)
        if load != self._load:
            self._load, self._load_told = load, now
            message = self._encoder.encode(load)
            for door in self._doors.values():
                door.outbox.send(message)

    def _answer(self, sequences: list[Sequence]) -> None:
        name, request = _address(sequences[0])
        door = self._doors[name]
        door.requests.remove(request)
        door.streams.pop(request, None)
        self._deadlines.pop(sequences[0].key, None)
        finished = messages.Finished(request, [_result(sequence) for sequence in sequences])
        door.outbox.send(self._encoder.encode(finished))

    def _leave(self, engine: Engine, name: str) -> None:
        door = self._doors.pop(name)
        for request in door.requests:
            engine.cancel((name, request))
            self._deadlines.pop((name, request), None)
        self._poller.unregister(door.pidfd)
        os.close(door.pidfd)
        door.outbox.close(linger=1000)


def _load_of(engine: Engine) -> messages.Load:
    scheduler, pool = engine.scheduler, engine.scheduler.pool
    used = pool.num_pages - pool.num_free
    return messages.Load(len(scheduler.running), len(scheduler.waiting), used, pool.num_pages)


def _address(sequence: Sequence) -> tuple[str, int]:
    """The door and the number of the request that a sequence belongs to."""
    assert isinstance(sequence.key, tuple)
    door, request = sequence.key
    return door, request


def _result(sequence: Sequence) -> messages.Result:
    assert sequence.finish_reason is not None
    log_probs = sequence.log_probs if sequence.params.is_return_log_probs else []
    return messages.Result(sequence.output, sequence.finish_reason, log_probs)


def remove_files(directory: Path) -> None:
    """Remove what this engine put there, and the directory unless a door is in it."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("engine.sock", "engine.pid", "lock"):
            (directory / name).unlink(missing_ok=True)
    remove_if_empty(directory)


def end_with_server(server_pid: int, directory: Path) -> None:
    """Make this process end when the server has ended, even while weights load or a step hangs."""

    def end() -> None:
        time.sleep(STUBS_END_BY_THEMSELVES)
        end_orphaned_stubs(server_pid)
        shutil.rmtree(directory.parent, ignore_errors=True)
        os._exit(0)

    when_ended(server_pid, end)


def main(arguments_given: list[str] | None = None, make_engine: Callable[[EngineConfig], Engine] = Engine) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="JSON", help="an EngineConfig")
    parser.add_argument("--directory", required=True, type=Path, help="where the sockets are")
    parser.add_argument("--server-pid", required=True, type=int, help="the process to end with")
    parser.add_argument("--door-pid", required=True, type=int, help="the door that starts this engine")
    arguments = parser.parse_args(arguments_given)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _exit_on_signal)

    end_with_server(arguments.server_pid, arguments.directory)
    server = EngineServer(arguments.directory, arguments.door_pid)
    try:
        started = time.monotonic()
        engine = make_engine(EngineConfig.from_json(arguments.config))
        with contextlib.closing(engine):
            log.info("model loaded in %.1f s, %s", time.monotonic() - started, engine.summary())
            server.run(engine)
    except EngineError as error:
        (arguments.directory / "error.txt").write_text(str(error))
        return 1
    finally:
        server.close()
        remove_files(arguments.directory)
    return 0


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
