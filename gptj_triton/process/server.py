"""The engine process: answers its frontends over ZeroMQ while the engine steps. Knows nothing of Triton.

    python -m gptj_triton.process.server --config JSON --directory DIR --server-pid PID --owner-pid PID

It binds DIR/engine.sock. It ends after its last frontend said goodbye, or when its owner and the server have ended,
however they end; frontends that died are not its end, since others may come. If it cannot start, DIR/error.txt says
why.
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
from collections.abc import Callable
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
from gptj_triton.pidfd import open_pidfd
from gptj_triton.process import messages
from gptj_triton.process.deadlines import Deadlines
from gptj_triton.process.directory import EngineDirectory, write_private
from gptj_triton.process.frontend import Frontend, Stream, address_of, result_of
from gptj_triton.process.heartbeat import Heartbeat
from gptj_triton.process.lifetime import Lifetime

REPORT_INTERVAL = 0.25  # seconds between two reports of the metrics
ALONE_SECONDS = 600  # for which an engine without frontends waits for one
SHUTTING_DOWN = "the server is shutting down"
NOT_BEGUN = "the request waited for its whole timeout, and was not begun; please try again later"

log = logging.getLogger("gptj_triton")


class EngineServer:
    """Messages in, engine steps, messages out: one thread, one loop."""

    def __init__(self, directory: EngineDirectory, heartbeat: Heartbeat, lifetime: Lifetime) -> None:
        """Bind the socket in `directory`."""
        self._directory = directory
        self._heartbeat = heartbeat
        self._lifetime = lifetime
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(directory.engine_address)
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._frontends: dict[str, Frontend] = {}
        self._left = False  # by the last frontend
        self._drain_deadline: float | None = None
        self._drained = False
        self._deadlines = Deadlines()
        self._reported = EngineMetrics()
        self._next_report = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages.ToEngine)

    def run(self, engine: Engine) -> None:
        """Serve until the last frontend left, or none has come for long."""
        while not self._left:
            self._receive(engine, wait=not engine.busy and self._drained is (self._drain_deadline is not None))
            self._end_what_is_due(engine)
            if engine.busy:
                for sequences in engine.step():
                    self._answer(sequences)
                self._send_deltas()
            self._report_metrics(engine)

    def close(self) -> None:
        self._context.destroy(linger=1000)

    def _receive(self, engine: Engine, wait: bool) -> None:
        if wait:
            self._heartbeat.rest()
        events = dict(self._poller.poll(self._most_wait(engine) if wait else 0))
        self._heartbeat.begin_step()
        dead = [frontend for frontend in self._frontends.values() if frontend.pidfd in events]
        if wait and not events and not self._frontends:
            log.warning("no frontend has come for %d s; the engine ends", ALONE_SECONDS)
            self._left = True
        while self._inbox.poll(0):
            try:
                message = self._decoder.decode(self._inbox.recv())
            except msgspec.DecodeError as error:
                log.error("a message that is none: %s", error)
            else:
                self._handle(engine, message)
        for name, frontend in list(self._frontends.items()):
            if frontend in dead:
                self._leave(engine, name)
                self._directory.remove_frontend_files(name)

    def _handle(self, engine: Engine, message: messages.ToEngine) -> None:
        if isinstance(message, messages.Hello):
            self._join(engine, message)
        elif isinstance(message, messages.Drain):
            self._begin_drain(message.seconds)
        elif message.frontend not in self._frontends:
            return  # it has died
        elif isinstance(message, messages.Submit):
            self._submit(engine, message)
        elif isinstance(message, messages.Cancel):
            cancelled = engine.cancel((message.frontend, message.request))
            if cancelled:
                self._answer(cancelled)
        else:
            self._leave(engine, message.frontend)
            self._left = not self._frontends

    def _join(self, engine: Engine, hello: messages.Hello) -> None:
        self._directory.remove_dead_frontends()
        pidfd = open_pidfd(hello.pid)
        if pidfd is None:
            return
        self._lifetime.add_server(hello.server_pid)
        outbox = self._context.socket(zmq.PUSH)
        outbox.set_hwm(0)
        outbox.connect(hello.address)
        self._frontends[hello.frontend] = Frontend(hello.model, outbox, pidfd)
        self._left = False
        self._poller.register(pidfd, zmq.POLLIN)
        model = engine.model_config
        welcome = messages.Welcome(os.getpid(), engine.limits, model.start_id, model.end_ids)
        outbox.send(self._encoder.encode(welcome))
        self._send_report(engine)
        if self._drain_deadline is not None:
            outbox.send(self._encoder.encode(messages.Draining(0.0)))

    def _submit(self, engine: Engine, submit: messages.Submit) -> None:
        frontend = self._frontends[submit.frontend]
        if self._drain_deadline is not None:
            refused = messages.Refused(submit.request, SHUTTING_DOWN, reason="draining")
            frontend.outbox.send(self._encoder.encode(refused))
            return
        if not submit.params.fits(submit.prompt, engine.limits):  # it was checked for the engine before this one
            words = "the request does not fit the model that is served now"
            refused = messages.Refused(submit.request, words, True, "invalid")
            frontend.outbox.send(self._encoder.encode(refused))
            return
        if submit.client.number != frontend.client:
            frontend.client, frontend.asked = submit.client.number, Request(submit.client.num_tokens)
            frontend.refusal = engine.refusal(submit.client.num_tokens)
        if frontend.refusal is not None:
            refused = messages.Refused(submit.request, frontend.refusal, reason="queue_full")
            frontend.outbox.send(self._encoder.encode(refused))
            return
        key = submit.frontend, submit.request
        sequence = Sequence(key, submit.prompt, submit.params, submitted_at=submit.submitted_at, request=frontend.asked)
        engine.submit(sequence)
        frontend.requests.add(submit.request)
        if submit.stream:
            frontend.streams[submit.request] = Stream(sequence)
        if submit.timeout:
            self._deadlines.add(sequence, submit.submitted_at + submit.timeout)

    def _end_what_is_due(self, engine: Engine) -> None:
        """End the requests whose time is over; from now on, stream those that will end soon."""
        now = time.monotonic()
        due = self._deadlines.take_due(now)
        for sequence in due.ending:
            if sequence.params.beam_width == 1:
                name, request = address_of(sequence)
                self._frontends[name].streams.setdefault(request, Stream(sequence))
        for sequence in due.over:
            self._time_out(engine, sequence)
        if self._drain_deadline is not None:
            self._go_on_draining(engine, now)

    def _time_out(self, engine: Engine, sequence: Sequence) -> None:
        """Answer a request with what there is of it, or refuse it if it was not begun."""
        name, request = address_of(sequence)
        sequences = engine.cancel(sequence.key, "timeout")
        if sequence.request.begun:
            self._answer(sequences)
        else:
            self._forget(name, request)
            refused = messages.Refused(request, NOT_BEGUN, reason="timeout")
            self._frontends[name].outbox.send(self._encoder.encode(refused))

    def _begin_drain(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        if self._drain_deadline is None or deadline < self._drain_deadline:
            self._drain_deadline = deadline
            message = self._encoder.encode(messages.Draining(seconds))
            for frontend in self._frontends.values():
                frontend.outbox.send(message)

    def _go_on_draining(self, engine: Engine, now: float) -> None:
        """Answer what has no time left, and say so when nothing is left."""
        assert self._drain_deadline is not None
        cut = 0
        if self._drain_deadline <= now:
            for name, frontend in self._frontends.items():
                for request in list(frontend.requests):
                    engine.cancel((name, request))
                    self._forget(name, request)
                    frontend.outbox.send(self._encoder.encode(messages.Refused(request, SHUTTING_DOWN)))
                    cut += 1
        if not any(frontend.requests for frontend in self._frontends.values()) and not self._drained:
            self._drained = True
            write_private(self._directory.drained_file, msgspec.json.encode({"cut": cut}).decode())

    def _send_deltas(self) -> None:
        for frontend in self._frontends.values():
            deltas = list(filter(None, [stream.take_delta() for stream in frontend.streams.values()]))
            if deltas:
                frontend.outbox.send(self._encoder.encode(messages.Deltas(deltas)))

    def _report_metrics(self, engine: Engine) -> None:
        """Report if it is time to and anything has happened."""
        if time.monotonic() >= self._next_report and self._has_news(engine):
            self._send_report(engine)

    def _most_wait(self, engine: Engine) -> int | None:
        """Milliseconds for which an idle engine may wait: for a frontend, or until it is to report. None: as long as it
        takes.
        """
        if not self._frontends:
            return ALONE_SECONDS * 1000
        if not self._has_news(engine):
            return None
        return max(0, math.ceil((self._next_report - time.monotonic()) * 1e3))

    def _has_news(self, engine: Engine) -> bool:
        engine.scheduler.update_gauges()
        return engine.metrics.has_news(self._reported)

    def _send_report(self, engine: Engine) -> None:
        """Send all frontends what has been counted: the first of them by its model's name publishes it."""
        if not self._frontends:
            return
        engine.scheduler.update_gauges()
        self._reported, self._next_report = engine.metrics.take(), time.monotonic() + REPORT_INTERVAL
        publisher = min(self._frontends, key=lambda name: (self._frontends[name].model, name))
        message = self._encoder.encode(messages.Report(publisher, self._reported))
        for frontend in self._frontends.values():
            frontend.outbox.send(message)

    def _answer(self, sequences: list[Sequence]) -> None:
        name, request = address_of(sequences[0])
        self._forget(name, request)
        finished = messages.Finished(request, [result_of(sequence) for sequence in sequences])
        self._frontends[name].outbox.send(self._encoder.encode(finished))

    def _forget(self, name: str, request: int) -> None:
        frontend = self._frontends[name]
        frontend.requests.remove(request)
        frontend.streams.pop(request, None)
        self._deadlines.forget((name, request))

    def _leave(self, engine: Engine, name: str) -> None:
        frontend = self._frontends.pop(name)
        for request in frontend.requests:
            engine.cancel((name, request))
            self._deadlines.forget((name, request))
        self._poller.unregister(frontend.pidfd)
        os.close(frontend.pidfd)
        frontend.outbox.close(linger=1000)
        self._send_report(engine)  # another frontend may be the one that publishes now


def main(
    arguments: list[str] | None = None,
    load: Callable[[EngineConfig], Engine] = load_engine,
    clean_up: Callable[[int], None] = lambda server_pid: None,
) -> int:
    """Run an engine that `load` makes; `clean_up` is called when a server has ended, with its process id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="JSON", help="an EngineConfig")
    parser.add_argument("--directory", required=True, type=Path, help="where the sockets are")
    parser.add_argument("--server-pid", required=True, type=int, help="the server of the frontend that starts this")
    parser.add_argument("--owner-pid", required=True, type=int, help="the process to end with, if not before")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _exit_on_signal)
    os.umask(0o077)

    directory = EngineDirectory(options.directory)
    lifetime = Lifetime(options.owner_pid, options.server_pid, directory, clean_up)
    heartbeat = Heartbeat(directory.heartbeat)
    server = EngineServer(directory, heartbeat, lifetime)
    try:
        started = time.monotonic()
        engine = load(EngineConfig.from_json(options.config))
        with contextlib.closing(engine):
            engine.test()
            directory.attempts_file.unlink(missing_ok=True)
            log.info("model loaded in %.1f s, %s", time.monotonic() - started, engine.summary())
            server.run(engine)
    except EngineError as error:
        write_private(directory.error_file, str(error))
        return 1
    finally:
        server.close()
        with directory.locked():
            directory.remove_engine_files()
        directory.remove_if_unused()
    return 0


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
