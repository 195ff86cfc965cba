"""Lets the engines of a run answer what they have before the run ends."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import msgspec
import zmq

from gptj_triton.pidfd import process_has_ended
from gptj_triton.process.messages import Drain

ANSWER_SECONDS = 2.0  # what an engine takes beyond the time it was given, to answer the rest with errors
SEND_MILLISECONDS = 500


class Draining:
    """Tells each engine below `engines` to take no more requests and to end those it has within `seconds`."""

    def __init__(self, engines: Path, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds + ANSWER_SECONDS
        # Where no frontend is ready there is nothing to answer.
        self._directories = {path.parent for path in engines.glob("*/*.ready")}
        with zmq.Context() as context:
            for directory in self._directories:
                with context.socket(zmq.PUSH) as socket:
                    socket.linger = SEND_MILLISECONDS  # at most
                    socket.connect(f"ipc://{directory}/engine.sock")
                    socket.send(msgspec.msgpack.encode(Drain(seconds)))

    @property
    def has_engines(self) -> bool:
        return bool(self._directories)

    @property
    def is_over(self) -> bool:
        """Whether all of them have done so, have ended, or took too long."""
        return time.monotonic() > self._deadline or not any(map(is_draining, self._directories))

    @property
    def cut(self) -> int:
        """How many requests were ended with an error; what an engine had that does not say so counts as one."""
        return sum(map(requests_cut, self._directories))


def is_draining(directory: Path) -> bool:
    if (directory / "drained").exists():
        return False
    with contextlib.suppress(OSError, ValueError):
        return not process_has_ended(int((directory / "engine.pid").read_text()))
    return False


def requests_cut(directory: Path) -> int:
    try:
        return int(json.loads((directory / "drained").read_text())["cut"])
    except OSError:
        return 1
