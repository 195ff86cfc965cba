"""A frontend's side of the engine: starts the engine process or joins it, sends requests, hands answers back. Loads no
torch.

All frontends of one server with equal settings share one engine. When it dies, or gives no sign of life, every request
in flight is answered with an error and a new engine is started, as often as it takes; until that works, `submit`
raises.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import ConfigError, RequestRefusedError, UnavailableError
from gptj_triton.pidfd import process_has_ended
from gptj_triton.process import messages
from gptj_triton.process.cancel_handle import make_handle
from gptj_triton.process.connection import EngineConnection
from gptj_triton.process.deadly_requests import DeadlyRequests
from gptj_triton.process.directory import write_private
from gptj_triton.process.heartbeat import TICK_SECONDS, HeartbeatWatch

NOT_READY = "the engine is not ready yet; please try again"
ENGINE_DIED = "the engine process ended unexpectedly; a new one is being started, please try again"
NO_ENGINE = "the engine process ended and no new one works yet, which the server goes on trying; please try again later"
SHUTTING_DOWN = "the server is shutting down"
DRAIN_GRACE = 1.0  # seconds after which an engine that should have answered all requests is not waited for
RETRY_SECONDS = 1.0  # after an error that is not the engine's: a full disk, say

log = logging.getLogger("gptj_triton")


@dataclass(frozen=True)
class Failed:
    """The answer to a request that no engine finishes; `message` says why, and `invalid` that none ever will.

    `refused` is a word for the metrics where it was not begun, one of REFUSAL_REASONS.
    """

    message: str
    invalid: bool = False
    refused: str = ""


Answer: TypeAlias = messages.Finished | Failed
OnAnswer: TypeAlias = Callable[[Answer], None]
OnTokens: TypeAlias = Callable[[messages.TokenDelta], None]


class Pending(NamedTuple):
    """A request in flight."""

    prompt: list[int]
    params: SamplingParams
    on_answer: OnAnswer
    on_tokens: OnTokens


class EngineClient:
    """Requests go out from the thread that calls `submit`; answers arrive on a thread of this class."""

    def __init__(
        self,
        config: EngineConfig,
        server_pid: int,
        name: str,
        engine_module: str = "gptj_triton.process.server",
        model: str = "",
        on_report: Callable[[EngineMetrics | None], None] = lambda report: None,
    ) -> None:
        """Join the engine, starting it if it is not there; returns when it has generated a token.

        `server_pid` is the server of this frontend, and `name` is unique among the frontends of that server;
        `engine_module` is run as the engine process. `on_report` is called on another thread with what the engine has
        counted since the last call, or with None if another frontend publishes that: the first by `model`. Raises
        ConfigError with the engine's own words when it cannot start.
        """
        self._server_pid = server_pid
        self._name = name
        self._on_report = on_report
        self._publishes = False
        self._step_timeout = config.step_timeout
        self._pending: dict[int, Pending] = {}
        self._deadly = DeadlyRequests(config.refuse_after_deaths)
        self._watch: HeartbeatWatch | None = None  # of the engine that serves, or served last
        self._lock = threading.Lock()  # guards _pending, _deadly, _ready and sending
        self._ready = False
        self._unavailable = NOT_READY
        self._drain_deadline: float | None = None
        self._connection = EngineConnection(config, server_pid, name, engine_module, model)
        self._directory = self._connection.directory
        try:
            welcome = self._connection.connect()
            assert welcome is not None
            self._begin(welcome)
        except BaseException:
            self._connection.leave(linger=0)
            raise
        self._receiver = threading.Thread(target=self._receive, name="engine-answers", daemon=True)
        self._receiver.start()

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_answer: OnAnswer,
        on_tokens: OnTokens = lambda delta: None,
        stream: bool = False,
        timeout: float = 0.0,
        client: messages.ClientRequest | None = None,
    ) -> int:
        """Send a request; `on_answer` is called exactly once, on another thread. Returns the number to cancel it by.

        After `timeout` seconds, unless 0, the request ends with finish reason "timeout", or is refused if it was not
        begun. `on_tokens` is called before that, on the same thread, as tokens come: of a request with `stream`, and in
        the last seconds before a timeout. `client` is the client's request that it is of, where that is more than this
        one. Raises UnavailableError while there is no engine, and RequestRefusedError where too many engines died under
        such a request.
        """
        with self._lock:
            if not self._ready:
                reason = "draining" if self._unavailable == SHUTTING_DOWN else "engine_down"
                raise UnavailableError(self._unavailable, reason)
            if deaths := self._deadly.deaths_under(prompt, params):
                raise RequestRefusedError(
                    f"the request is refused: the engine process ended unexpectedly {deaths} times while it had a "
                    "request with the same prompt and the same parameters (parameter refuse_after_deaths)"
                )
            number = secrets.randbits(63)  # nobody can guess it: a cancel handle carries it
            self._pending[number] = Pending(prompt, params, on_answer, on_tokens)
            client = client or messages.ClientRequest(number, params.most_tokens(len(prompt)))
            now = time.monotonic()
            self._connection.send(messages.Submit(self._name, number, prompt, params, client, now, stream, timeout))
        return number

    def cancel_handle(self, number: int) -> bytes:
        """What lets other processes of this server cancel a request."""
        return make_handle(self._directory.path.name, messages.Cancel(self._name, number))

    def cancel(self, number: int) -> None:
        """End a request early; its answer has finish reason "cancelled". Nothing happens if it has ended."""
        with self._lock:
            if number in self._pending:
                self._connection.send(messages.Cancel(self._name, number))

    def close(self) -> None:
        """Leave the engine, which ends if this was its last frontend. Requests in flight are answered with an error.

        A second call does nothing.
        """
        with self._lock:
            if self._connection.is_closing:
                return
            self._connection.is_closing = True
        self._connection.interrupt()
        self._receiver.join()
        self._stop_submitting(SHUTTING_DOWN)
        with self._lock:  # somebody may cancel a request now
            self._connection.send(messages.Goodbye(self._name))
        self._fail_pending(SHUTTING_DOWN)
        self._connection.leave(linger=1000)

    def _begin(self, welcome: messages.Welcome) -> None:
        """Take requests from now on."""
        self.engine_info = welcome
        try:
            write_private(self._directory.ready_file(self._name), str(os.getpid()))
        except OSError as error:  # a full disk
            log.error("the server cannot be told that the engine is ready: %s", error.strerror)
        with self._lock:
            self._ready = not self._connection.is_closing

    def _stop_submitting(self, reason: str) -> None:
        """Take no requests from now on."""
        with self._lock:
            self._ready = False
            self._unavailable = reason
        self._directory.ready_file(self._name).unlink(missing_ok=True)

    def _receive(self) -> None:
        """Hand answers to their requests until this frontend closes, or there is to be no engine any more."""
        while self._serve():
            self._lose_engine()
            if not self._reconnect():
                return

    def _serve(self) -> bool:
        """Hand answers on until the engine has ended, or had to be; false if this frontend closes instead."""
        self._watch = None
        try:
            self._watch = watch = HeartbeatWatch(self._directory.heartbeat, self._step_timeout)
        except OSError:  # it has ended
            return True
        next_look = time.monotonic() + TICK_SECONDS
        while not (events := self._connection.wait()).ended:
            if events.closing:
                return False
            if events.message:
                self._take_message()
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + TICK_SECONDS
                self._end_overdue_drain()
                if self._connection.end_engine_for(watch.look()):
                    return True
        return True

    def _take_message(self) -> None:
        try:
            self._dispatch(self._connection.receive())
        except Exception:  # this thread brings all other answers, too
            log.exception("a message of the engine could not be handed on")

    def _dispatch(self, message: messages.ToFrontend) -> None:
        if isinstance(message, messages.Report):
            self._publishes = message.publisher == self._name
            self._on_report(message.metrics if self._publishes else None)
        elif isinstance(message, messages.Deltas):
            for delta in message.deltas:
                pending = self._pending.get(delta.request)
                if pending is not None:
                    pending.on_tokens(delta)
        elif isinstance(message, messages.Draining):
            self._stop_submitting(SHUTTING_DOWN)
            self._drain_deadline = time.monotonic() + message.seconds + DRAIN_GRACE
        elif isinstance(message, messages.Finished | messages.Refused):
            self._answer(message)

    def _answer(self, message: messages.Finished | messages.Refused) -> None:
        with self._lock:
            pending = self._pending.pop(message.request, None)
            if pending is None:
                return  # it was answered when the engine was given up
            if isinstance(message, messages.Finished):
                self._deadly.clear(pending.prompt, pending.params)
        pending.on_answer(
            message
            if isinstance(message, messages.Finished)
            else Failed(message.message, message.invalid, message.reason)
        )

    def _end_overdue_drain(self) -> None:
        if self._drain_deadline is not None and time.monotonic() > self._drain_deadline:
            self._fail_pending(SHUTTING_DOWN)

    def _lose_engine(self) -> None:
        """The engine died: answer what was in flight."""
        draining = self._drain_deadline is not None
        self._stop_submitting(SHUTTING_DOWN if draining else ENGINE_DIED)
        while self._connection.has_message:  # answers sent before it died count
            self._take_message()
        if self._publishes:
            hung = self._watch is not None and self._watch.hangs
            self._on_report(EngineMetrics(engine_restarts_total=1, engine_hangs_total=int(hung)))
        with self._lock:
            self._deadly.count((pending.prompt, pending.params) for pending in self._pending.values())
        self._fail_pending(ENGINE_DIED)

    def _reconnect(self) -> bool:
        """Start a new engine, as often as it takes; false where none is needed any more."""
        self._connection.await_end()
        log.error("the engine process ended unexpectedly; starting a new one")
        while not (self._connection.is_closing or self._drain_deadline or process_has_ended(self._server_pid)):
            try:
                welcome = self._connection.connect()
            except ConfigError as error:
                self._unavailable = NO_ENGINE
                log.error("no new engine works, which is tried again: %s", error)
                continue
            except Exception:  # without this thread no engine would ever come
                self._unavailable = NO_ENGINE
                log.exception("no new engine can be started, which is tried again")
                self._connection.sleep(RETRY_SECONDS)
                continue
            if welcome is None:
                return False
            self._begin(welcome)
            log.warning("the new engine process, %d, is ready", welcome.engine_pid)
            return True
        return False

    def _fail_pending(self, reason: str) -> None:
        with self._lock:
            failed, self._pending = self._pending, {}
        for pending in failed.values():
            pending.on_answer(Failed(reason))
