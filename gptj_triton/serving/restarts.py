"""How often, and how soon, a server that died is started again. Knows numbers only."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

STEADY_SECONDS = 2.0  # a server that was ready for so long is none that dies at once
FIRST_PAUSE = 0.25  # seconds
LONGEST_PAUSE, LONGEST_AFTER_READY = 10.0, 2.0  # where a server did not become ready, and where it did


@dataclass
class Restarts:
    """At most `limit` restarts within any `window` seconds. Times are those of one clock that only goes forward."""

    limit: int
    window: float
    count: int = 0  # restarts so far
    _recent: deque[float] = field(default_factory=deque)
    _quick_deaths: int = 0

    def pause_before_next(self, now: float, ready_for: float) -> float | None:
        """Seconds to wait before the server is started again, which died `now` and had been ready for so long (0: it
        never was); None when it has been started again too often. The first restart is at once, and so is each after a
        server that was ready for a while; the pauses before others double."""
        while self._recent and self._recent[0] <= now - self.window:
            self._recent.popleft()
        if len(self._recent) >= self.limit:
            return None
        self._quick_deaths = 0 if ready_for >= STEADY_SECONDS else self._quick_deaths + 1
        self._recent.append(now)
        self.count += 1
        if self._quick_deaths <= 1:
            return 0.0
        longest = LONGEST_AFTER_READY if ready_for else LONGEST_PAUSE
        return float(min(FIRST_PAUSE * 2 ** (self._quick_deaths - 2), longest))
