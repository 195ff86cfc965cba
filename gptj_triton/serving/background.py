"""Calls on another thread, so that a loop which makes them never waits for a server that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

Result = TypeVar("Result")

MOMENT = 0.05  # seconds; most calls take less


class Background(Generic[Result]):
    """Makes one call at a time. A call that never ends does not keep the program from ending."""

    def __init__(self) -> None:
        self._future: Future[Result] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether there is a call whose result was not taken."""
        return self._future is not None

    def take(self, call: Callable[[], Result]) -> Result | None:
        """Begins the call, unless there is one already, and waits a moment. Returns, or raises, what came of the one
        that there is, once; None as long as it has not ended."""
        if self._future is None:
            self._future = Future()
            threading.Thread(target=_make, args=[call, self._future], daemon=True).start()
        if not wait([self._future], MOMENT).done:
            return None
        ended, self._future = self._future, None
        return ended.result()


def _make(call: Callable[[], Result], future: Future[Result]) -> None:
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
