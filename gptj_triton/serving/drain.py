"""Lets the engines of a run answer what they have before the run ends."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import msgspec
import zmq

from gptj_triton.process.directory import EngineDirectory
from gptj_triton.process.messages import Drain

ANSWER_SECONDS = 2.0  # what an engine takes beyond the time it was given, to answer the rest with errors
SEND_MILLISECONDS = 500


class Draining:
    """Tells each engine below `engines` to take no more requests and to end those it has within `seconds`."""

    def __init__(self, engines: Path, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds + ANSWER_SECONDS
        # Where no frontend is ready there is nothing to answer.
        self._engines = [EngineDirectory(path) for path in {ready.parent for ready in engines.glob("*/*.ready")}]
        with zmq.Context() as context:
            for engine in self._engines:
                with context.socket(zmq.PUSH) as socket:
                    socket.linger = SEND_MILLISECONDS  # at most
                    socket.connect(engine.engine_address)
                    socket.send(msgspec.msgpack.encode(Drain(seconds)))

    @property
    def has_engines(self) -> bool:
        return bool(self._engines)

    @property
    def is_over(self) -> bool:
        """Whether all of them have done so, have ended, or took too long."""
        return time.monotonic() > self._deadline or not any(map(is_draining, self._engines))

    @property
    def cut(self) -> int:
        """How many requests were ended with an error; what an engine had that does not say so counts as one."""
        return sum(map(requests_cut, self._engines))


def is_draining(engine: EngineDirectory) -> bool:
    """Whether the engine lives and has not answered everything."""
    if engine.drained_file.exists() or (pidfd := engine.open_engine()) is None:
        return False
    os.close(pidfd)
    return True


def requests_cut(engine: EngineDirectory) -> int:
    """What the engine says; 1 where it says nothing."""
    try:
        return int(json.loads(engine.drained_file.read_text())["cut"])
    except OSError:
        return 1
