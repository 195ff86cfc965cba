"""The whole runs of `benchmark_gpu.py`, simulated, beside what it measured. Needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gptj_triton.bench.capacity.replica import Arrival
from gptj_triton.bench.capacity.replica_files import ReplicaKind
from gptj_triton.bench.capacity.simulation import simulate

WHOLE_RUN = re.compile(r"whole run (\d+)/(\d+), (\d+) requests")
HEADING = f"{'':<36} {'predicted':>10} {'measured':>10} {'ratio':>6}"


@dataclass(frozen=True)
class WholeRun:
    """Output tokens a second of requests that come all at once."""

    what: str
    predicted: float
    measured: float

    def __str__(self) -> str:
        ratio = self.predicted / self.measured
        return f"{self.what:<36} {self.predicted:>10,.0f} {self.measured:>10,.0f} {ratio:>6.2f}"


def whole_runs(kind: ReplicaKind, most_tokens: float = float("inf")) -> Iterator[WholeRun]:
    """Those of at most so many output tokens."""
    alone = replace(kind.settings, own_seconds=0.0, max_waiting_requests=1 << 30, max_waiting_tokens=1 << 40)
    for measurement in kind.result["measurements"]:
        if match := WHOLE_RUN.fullmatch(measurement["what"]):
            prompt, output, requests = map(int, match.groups())
            if requests * output <= most_tokens:
                served, _ = simulate(kind.times, alone, [Arrival(0.0, prompt, output)] * requests)
                seconds = max(each.ended_at for each in served)
                yield WholeRun(measurement["what"], requests * output / seconds, measurement["value"])
