"""Signs of life of an engine process, which its frontends read: it may be stopped, or a step may hang.

They are in memory of the engine process (a memfd), to which a link in its directory leads, so that no disk can hold a
beat up: 4 numbers of 8 bytes, beats so far, steps so far, since when a step runs (ns of CLOCK_MONOTONIC), 0 if none
does, and 1 once a frontend found that the engine hangs, which the others read there.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from pathlib import Path

BEAT_SECONDS = 0.2
TICK_SECONDS = 0.25  # between two looks of a frontend
SILENT_SECONDS = 3.0
SILENT_LOADING_SECONDS = 60.0  # Python code can be held up for long while weights are read
LAYOUT = struct.Struct("qqqq")
_BEATS, _STEP, _HANGS = struct.Struct("q"), struct.Struct("qq"), struct.Struct("q")
_HANGS_AT = LAYOUT.size - _HANGS.size


class Heartbeat:
    """The engine's side. A step is all that the engine does between two times of waiting for messages."""

    def __init__(self, path: Path) -> None:
        """Begin to beat, on a thread that lasts as long as the process."""
        memory = os.memfd_create("gptj-heartbeat")
        os.ftruncate(memory, LAYOUT.size)
        self._map = mmap.mmap(memory, LAYOUT.size)
        self._steps = 0
        path.unlink(missing_ok=True)
        path.symlink_to(f"/proc/{os.getpid()}/fd/{memory}")
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def begin_step(self) -> None:
        self._steps += 1
        _STEP.pack_into(self._map, _BEATS.size, self._steps, time.monotonic_ns())

    def rest(self) -> None:
        """No step runs from now on."""
        _STEP.pack_into(self._map, _BEATS.size, self._steps, 0)

    def _beat(self) -> None:
        beats = 0
        while True:
            beats += 1
            _BEATS.pack_into(self._map, 0, beats)
            time.sleep(BEAT_SECONDS)


class HeartbeatWatch:
    """A frontend's side. It counts its own looks and no seconds, so time in which the machine was suspended or too busy
    for both counts for neither.
    """

    def __init__(self, path: Path, step_timeout: float) -> None:
        """`path` is the engine's; a step may take `step_timeout` seconds, with 0 as long as it likes. Raises OSError
        where the engine has ended, or has not begun to beat.
        """
        memory = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(memory, LAYOUT.size)
        finally:
            os.close(memory)
        self._step_timeout = step_timeout
        self._seen = (0, 0)  # beats, steps
        self._silent = self._in_step = 0  # looks

    @property
    def hangs(self) -> bool:
        """Whether any frontend found something wrong with the engine; still known when that has ended."""
        return bool(_HANGS.unpack_from(self._map, _HANGS_AT)[0])

    def look(self) -> str | None:
        """Called every TICK_SECONDS; says what is wrong with the engine, None if nothing is."""
        problem = self._problem()
        if problem is not None:
            _HANGS.pack_into(self._map, _HANGS_AT, 1)
        return problem

    def _problem(self) -> str | None:
        beats, steps, began, _ = LAYOUT.unpack_from(self._map)
        last_beats, last_steps = self._seen
        self._silent = self._silent + 1 if beats == last_beats else 0
        self._in_step = self._in_step + 1 if began and steps == last_steps else 0
        self._seen = beats, steps
        most = SILENT_SECONDS if steps else SILENT_LOADING_SECONDS
        if self._silent * TICK_SECONDS >= most:
            return f"no sign of life for {most:g} s"
        if self._step_timeout and self._in_step * TICK_SECONDS >= self._step_timeout:
            return f"a step takes longer than {self._step_timeout:g} s (parameter step_timeout)"
        return None
