"""Keeps a tritonserver running until a signal stops it: starts it again when it dies or when requests in it would hang,
and ends all processes of the run in the end. Does not know what is served."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import requests

from gptj_triton.serving.background import Background
from gptj_triton.serving.connections import Connections
from gptj_triton.serving.drain import Draining
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.log import log
from gptj_triton.serving.process import TritonProcess, adopt_orphans, end_children, reap
from gptj_triton.serving.readiness import Readiness
from gptj_triton.serving.relay import Relay
from gptj_triton.serving.restarts import Restarts
from gptj_triton.serving.run_directory import RunDirectory
from gptj_triton.serving.signals import StopRequestedError, block_signals, pause, sleep
from gptj_triton.serving.stub_watch import StubWatch
from gptj_triton.serving.triton_api import TritonApi, why_not_ready

POLL_SECONDS = 0.1
# tritonserver counts its own exit timeout in steps of a second; after that it is killed.
EXTRA_STOP_SECONDS = 3.0
# The engine ends by itself within this time after its last frontend left it.
ENGINE_SECONDS = 2.0

Start = Callable[[Relay, int], TritonProcess]


class Supervisor:
    """One run. The process that makes it must be single-threaded, and handles signals by waiting for them from then on;
    orphans of the server become its children, so that none escapes, however the server died.

    `start` is called with the relay of its output and the number of restarts so far; `models` are those that load
    something; `ports` are those of HTTP. All times are in seconds.
    """

    def __init__(
        self,
        start: Start,
        models: Sequence[str],
        ports: Collection[int],
        api: TritonApi,
        run: RunDirectory,
        restarts: Restarts,
        start_timeout: float,
        drain_delay: float,
        drain_timeout: float,
        exit_timeout: float,
    ) -> None:
        self._start = start
        self._models = models
        self._ports = ports
        self._api = api
        self._run = run
        self._restarts = restarts
        self._start_timeout = start_timeout
        self._drain_delay = drain_delay
        self._drain_timeout = drain_timeout
        self._exit_timeout = exit_timeout
        self._server: TritonProcess | None = None
        self._ready_at = 0.0  # when this server became ready; 0: it has not been
        self._has_served = False
        adopt_orphans()
        # Blocked from here on, so that a signal is neither lost nor raised in the middle of a clean-up.
        block_signals()
        self._relay = Relay()

    def serve(self, on_ready: Callable[[], None]) -> bool:
        """Serves until a signal to stop comes; `on_ready` is called once, when every model is ready. Returns whether
        requests were cut then. Raises ServeError when the first start fails, or the last restart that is
        allowed; StopRequestedError when the signal comes before the server was ready."""
        try:
            self._start_server()
            self._has_served = True
            on_ready()
            while True:
                self._keep_ready()
        except StopRequestedError:
            if not self._has_served:
                raise
            return self._drain()
        finally:
            self._stop()

    def _keep_ready(self) -> None:
        """Watches the server until it has to be given up, and returns when one is ready again."""
        while (cause := self._why_given_up()) is None:
            self._readiness.follow_engines()
            self._wait(POLL_SECONDS)
        given_up_at = time.monotonic()
        while True:
            now = time.monotonic()
            seconds = self._restarts.pause_before_next(now, now - self._ready_at if self._ready_at else 0.0)
            if seconds is None:
                limits = f"{self._restarts.limit} restarts in {self._restarts.window:g} s (--max-restarts)"
                raise ServeError(f"{cause}; not started again: {limits}")
            log.say(f"{cause}; starting tritonserver again" + (f" in {seconds:g} s" if seconds else ""), "error")
            self._end_server()
            sleep(seconds)
            try:
                self._start_server()
                return log.say(f"ready again, {time.monotonic() - given_up_at:.1f} s later")
            except ServeError as error:
                cause = str(error)

    def _start_server(self) -> None:
        """Starts a server and returns when every model is ready."""
        self._ready_at = 0.0
        self._server = self._start(self._relay, self._restarts.count)
        self._stubs = StubWatch(self._run.stubs, self._server.pid, self._is_loaded)
        self._readiness = Readiness(self._api, self._run.engines)
        self._asked, self._asked_of_models = Background[bool](), defaultdict[str, Background[bool]](Background)
        if not self._wait_until(self._answers, self._start_timeout):
            missing = ", ".join(model for model in self._models if model not in self._relay.loaded)
            timeout = f"not ready within {self._start_timeout:g} s (--start-timeout)"
            raise ServeError(f"{timeout}: {missing or 'tritonserver'}")
        self._wait(0.0)
        if self._server.has_ended:  # it was our own server that answered only if that still lives
            raise ServeError(self._server.why_ended())
        self._ready_at = time.monotonic()

    def _answers(self) -> bool:
        """True when all is ready, False while nothing answers; ServeError when a model failed."""
        return bool(self._asked.take(self._ask))

    def _ask(self) -> bool:
        """The same, however long an answer takes. tritonserver opens its ports when it has tried to load every
        model."""
        try:
            if self._api.is_ready():
                return True
            index = self._api.index()
        except requests.RequestException:
            return False
        # The user's own options for tritonserver may close the index to us.
        raise ServeError(
            f"not every model is ready: {self._relay.last_words}" if index is None else why_not_ready(index)
        )

    def _is_loaded(self, model: str) -> bool:
        try:
            return bool(self._asked_of_models[model].take(lambda: self._api.is_model_ready(model)))
        except requests.RequestException:
            return self._ready_at > 0.0  # then it hangs

    def _drain(self) -> bool:
        """Lets requests in flight finish, and stops the server in order; a second signal ends that. Returns whether
        requests were cut."""
        assert self._server is not None
        if self._server.has_ended or not self._ready_at:  # it is not ready again yet: nobody waits for an answer
            return False
        log.say("stopping when all requests are answered; a second signal kills")
        draining: Draining | None = None

        def is_over() -> bool:
            self._readiness.say(False)  # again, where Triton has not heard it yet
            return draining is not None and draining.is_over

        cut = True
        try:
            self._wait_until(is_over, self._drain_delay)
            draining = Draining(self._run.engines, self._drain_timeout)
            self._wait_until(is_over, self._drain_timeout + EXTRA_STOP_SECONDS)
            engines_cut = draining.cut > 0
            connections = Connections(self._server.pid, self._ports)
            connections.refuse_new()
            # What is not idle now waits for a model of the user's own, or reads slowly.
            seconds = self._exit_timeout if draining.has_engines else self._drain_timeout
            answered = self._wait_until(connections.close_idle, seconds)
            self._server.terminate()
            answered |= self._server.ends_in_order(self._exit_timeout + EXTRA_STOP_SECONDS)
            cut = engines_cut or not answered
        except StopRequestedError:
            log.say("killing", "warning")
        except ServeError as error:
            log.say(str(error), "error")
        return cut

    def _stop(self) -> None:
        """Ends all that is left."""
        goodbye = self._server is not None and self._server.has_ended_in_order
        self._end_server()
        end_children(ENGINE_SECONDS if goodbye else 0.0)
        self._relay.close()

    def _end_server(self) -> None:
        """Ends the server, in whatever state it is, and all that it started but the engine."""
        if self._server is None:
            return
        self._server.kill()
        end_children(0.0, spare=self._run.engine_pids)
        self._run.forget_server()

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Waits that long until something is so, and returns whether it is; ServeError where it cannot come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if cause := self._why_given_up():
                raise ServeError(cause)
            if time.monotonic() > deadline:
                return False
            self._wait(POLL_SECONDS)
        return True

    def _why_given_up(self) -> str | None:
        """Why the server cannot serve any more, as one line; None as long as it can."""
        assert self._server is not None
        return self._server.why_ended() if self._server.has_ended else self._stubs.failure()

    def _wait(self, seconds: float) -> None:
        """Waits that long, or until a child ends, and collects its status. StopRequestedError where a signal to stop
        comes."""
        if pause(seconds):
            assert self._server is not None
            reap(except_for=self._server.pid)
