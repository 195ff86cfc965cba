"""The engine process: answers its frontends over ZeroMQ while the engine steps. Knows nothing of Triton.

    python -m gptj_triton.process.server --config JSON --directory DIR --server-pid PID --frontend-pid PID

It binds DIR/engine.sock. It ends after its last frontend left, or when the server process ends, however that ends. If
it cannot start, DIR/error.txt says why.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
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
from gptj_triton.engine.load import load_engine
from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sequence import Request, Sequence
from gptj_triton.errors import EngineError
from gptj_triton.pidfd import open_pidfd, when_ended
from gptj_triton.process import messages
from gptj_triton.process.directory import EngineDirectory

REPORT_INTERVAL = 0.1  # seconds between two reports of the metrics while the engine is busy
NOT_BEGUN = "the request waited for its whole timeout, and was not begun; please try again later"

log = logging.getLogger("gptj_triton")


@dataclass(eq=False)
class Stream:
    """A streamed request: its sequence, and how many of its tokens have been sent."""

    sequence: Sequence
    num_sent: int = 0

    def take_delta(self) -> messages.TokenDelta | None:
        """The tokens that have not been sent yet, None if there are none; from now on they count as sent."""
        start, self.num_sent = self.num_sent, len(self.sequence.output)
        if start == self.num_sent:
            return None
        _, request = _address(self.sequence)
        log_probs = self.sequence.log_probs[start:] if self.sequence.params.is_return_log_probs else []
        return messages.TokenDelta(request, self.sequence.output[start:], log_probs)


@dataclass(eq=False)
class Frontend:
    """A process that sends requests: where to answer, how to see that it died, and its requests in flight.

    `socket` is the file that it receives at; the engine removes it when the frontend died. `client` is the number
    of the client's request that came last, `asked` what the engine knows of it, and `refusal` why it was refused.
    """

    outbox: zmq.Socket[bytes]
    pidfd: int
    socket: Path
    requests: set[int] = field(default_factory=set)
    streams: dict[int, Stream] = field(default_factory=dict)
    client: int | None = None
    asked: Request = field(default_factory=Request)
    refusal: str | None = None


class EngineServer:
    """Messages in, engine steps, messages out: one thread, one loop."""

    def __init__(self, directory: EngineDirectory, first_frontend_pid: int) -> None:
        """Bind the socket in `directory`; the server waits for the greeting of `first_frontend_pid`."""
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(directory.engine_address)
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._frontends: dict[str, Frontend] = {}
        self._first_frontend_pid = first_frontend_pid
        self._deadlines: dict[Hashable, float] = {}
        self._next_deadline = math.inf  # none is earlier
        self._reported = EngineMetrics()
        self._reported_at = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages.ToEngine)

    def run(self, engine: Engine) -> None:
        """Serve until the last frontend left."""
        self._await_greeting()
        self._receive(engine, wait=False)
        while self._frontends:
            self._receive(engine, wait=not engine.busy)
            self._end_what_is_due(engine)
            if engine.busy:
                for sequences in engine.step():
                    self._answer(sequences)
                self._send_deltas()
            self._report_metrics(engine)

    def _await_greeting(self) -> None:
        """Return when a frontend has greeted, or the one that started this engine died before it could."""
        pidfd = open_pidfd(self._first_frontend_pid)
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
        dead = [frontend for frontend in self._frontends.values() if frontend.pidfd in events]
        while self._inbox.poll(0):
            self._handle(engine, self._decoder.decode(self._inbox.recv()))
        for name, frontend in list(self._frontends.items()):
            if frontend in dead:
                self._leave(engine, name)
                frontend.socket.unlink(missing_ok=True)

    def _handle(self, engine: Engine, message: messages.ToEngine) -> None:
        if isinstance(message, messages.Hello):
            self._join(engine, message)
        elif message.frontend not in self._frontends:
            log.warning("message from a frontend that has left: %s", message.frontend)
        elif isinstance(message, messages.Submit):
            self._submit(engine, message)
        elif isinstance(message, messages.Cancel):
            cancelled = engine.cancel((message.frontend, message.request))
            if cancelled:
                self._answer(cancelled)
        else:
            self._leave(engine, message.frontend)

    def _join(self, engine: Engine, hello: messages.Hello) -> None:
        socket = Path(hello.address.removeprefix("ipc://"))
        pidfd = open_pidfd(hello.pid)
        if pidfd is None:
            socket.unlink(missing_ok=True)
            return
        outbox = self._context.socket(zmq.PUSH)
        outbox.set_hwm(0)
        outbox.connect(hello.address)
        self._frontends[hello.frontend] = Frontend(outbox, pidfd, socket)
        self._poller.register(pidfd, zmq.POLLIN)
        model = engine.model_config
        welcome = messages.Welcome(os.getpid(), engine.limits, model.start_id, model.end_ids)
        outbox.send(self._encoder.encode(welcome))
        engine.scheduler.update_gauges()
        outbox.send(self._encoder.encode(engine.metrics.without_histograms()))

    def _submit(self, engine: Engine, submit: messages.Submit) -> None:
        frontend = self._frontends[submit.frontend]
        if submit.client.number != frontend.client:
            frontend.client, frontend.asked = submit.client.number, Request()
            frontend.refusal = engine.refusal(submit.client.num_tokens)
        if frontend.refusal is not None:
            frontend.outbox.send(self._encoder.encode(messages.Refused(submit.request, frontend.refusal)))
            return
        sequence = Sequence((submit.frontend, submit.request), submit.prompt, submit.params, request=frontend.asked)
        engine.submit(sequence)
        frontend.requests.add(submit.request)
        if submit.stream:
            frontend.streams[submit.request] = Stream(sequence)
        if submit.timeout:
            deadline = self._deadlines[sequence.key] = time.monotonic() + submit.timeout
            self._next_deadline = min(self._next_deadline, deadline)

    def _end_what_is_due(self, engine: Engine) -> None:
        now = time.monotonic()
        if now < self._next_deadline:
            return
        for key in [key for key, deadline in self._deadlines.items() if deadline <= now]:
            sequences = engine.cancel(key, "timeout")
            if sequences[0].request.begun:
                self._answer(sequences)
            else:
                name, request = _address(sequences[0])
                self._forget(name, request)
                self._frontends[name].outbox.send(self._encoder.encode(messages.Refused(request, NOT_BEGUN)))
        self._next_deadline = min(self._deadlines.values(), default=math.inf)

    def _send_deltas(self) -> None:
        for frontend in self._frontends.values():
            deltas = list(filter(None, [stream.take_delta() for stream in frontend.streams.values()]))
            if deltas:
                frontend.outbox.send(self._encoder.encode(messages.Deltas(deltas)))

    def _report_metrics(self, engine: Engine) -> None:
        """Send the metrics to all frontends if they have changed: at once when the engine falls idle."""
        now = time.monotonic()
        if engine.busy and now < self._reported_at + REPORT_INTERVAL:
            return
        engine.scheduler.update_gauges()
        if engine.metrics.differ_from(self._reported):
            self._reported, self._reported_at = engine.metrics.take(), now
            message = self._encoder.encode(self._reported)
            for frontend in self._frontends.values():
                frontend.outbox.send(message)

    def _answer(self, sequences: list[Sequence]) -> None:
        name, request = _address(sequences[0])
        self._forget(name, request)
        finished = messages.Finished(request, [_result(sequence) for sequence in sequences])
        self._frontends[name].outbox.send(self._encoder.encode(finished))

    def _forget(self, name: str, request: int) -> None:
        frontend = self._frontends[name]
        frontend.requests.remove(request)
        frontend.streams.pop(request, None)
        self._deadlines.pop((name, request), None)

    def _leave(self, engine: Engine, name: str) -> None:
        frontend = self._frontends.pop(name)
        for request in frontend.requests:
            engine.cancel((name, request))
            self._deadlines.pop((name, request), None)
        self._poller.unregister(frontend.pidfd)
        os.close(frontend.pidfd)
        frontend.outbox.close(linger=1000)


def _address(sequence: Sequence) -> tuple[str, int]:
    """The frontend and the number of the request that a sequence belongs to."""
    assert isinstance(sequence.key, tuple)
    frontend, request = sequence.key
    return frontend, request


def _result(sequence: Sequence) -> messages.Result:
    assert sequence.finish_reason is not None
    log_probs = sequence.log_probs if sequence.params.is_return_log_probs else []
    return messages.Result(sequence.output, sequence.finish_reason, log_probs)


def end_with_server(server_pid: int, directory: EngineDirectory, clean_up: Callable[[int], None]) -> None:
    """Make this process end when the server has ended, even while weights load or a step hangs."""

    def end() -> None:
        clean_up(server_pid)
        directory.remove_server_directory()
        os._exit(0)

    when_ended(server_pid, end)


def main(
    arguments: list[str] | None = None,
    load: Callable[[EngineConfig], Engine] = load_engine,
    clean_up: Callable[[int], None] = lambda server_pid: None,
) -> int:
    """Run an engine that `load` makes; `clean_up` is called when the server has ended, with its process id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="JSON", help="an EngineConfig")
    parser.add_argument("--directory", required=True, type=Path, help="where the sockets are")
    parser.add_argument("--server-pid", required=True, type=int, help="the process to end with")
    parser.add_argument("--frontend-pid", required=True, type=int, help="the frontend that starts this engine")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _exit_on_signal)

    directory = EngineDirectory(options.directory)
    end_with_server(options.server_pid, directory, clean_up)
    server = EngineServer(directory, options.frontend_pid)
    try:
        started = time.monotonic()
        engine = load(EngineConfig.from_json(options.config))
        with contextlib.closing(engine):
            log.info("model loaded in %.1f s, %s", time.monotonic() - started, engine.summary())
            server.run(engine)
    except EngineError as error:
        directory.error_file.write_text(str(error), encoding="utf-8", errors="replace")
        return 1
    finally:
        server.close()
        with directory.locked():
            directory.remove_engine_files()
        directory.remove_if_empty()
    return 0


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
