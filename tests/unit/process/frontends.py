"""What tests of real frontends and engine processes share."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import time
from collections.abc import Callable

import psutil

from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import UnavailableError
from gptj_triton.process.client import Answer, EngineClient
from gptj_triton.process.messages import Finished

LONG = SamplingParams(request_output_len=900, end_ids=(256,), min_length=900)
SHORT = SamplingParams(request_output_len=5, end_ids=(256,), min_length=5)

Server = subprocess.Popen[bytes]


class Reports:
    """The engine's metrics as a frontend gets them."""

    def __init__(self, frontend: EngineClient) -> None:
        self._frontend = frontend
        self._last = EngineMetrics()

    @property
    def last(self) -> EngineMetrics:
        with contextlib.suppress(queue.Empty):
            while True:
                self._last = self._frontend.reports.get_nowait()
        return self._last


class Mailbox:
    """Collects the answers of several requests."""

    def __init__(self) -> None:
        self.answers: queue.Queue[Answer] = queue.Queue()

    def take(self) -> Answer:
        return self.answers.get(timeout=60.0)

    def tokens(self) -> list[int]:
        answer = self.take()
        assert isinstance(answer, Finished), answer
        return answer.results[0].tokens


def wait_until(condition: Callable[[], object], otherwise: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def submit_when_ready(frontend: EngineClient, mailbox: Mailbox) -> None:
    """As a user does who is told to try again."""
    deadline = time.monotonic() + 100
    while True:
        try:
            frontend.submit([1, 2, 3], SHORT, mailbox.answers.put)
        except UnavailableError:
            assert time.monotonic() < deadline, "no new engine came"
            time.sleep(0.02)
        else:
            return
