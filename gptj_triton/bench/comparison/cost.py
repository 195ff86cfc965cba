"""What a server uses while it is under load: processor time, memory, and the GPU where nvidia-smi is. Knows its process
id alone."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from gptj_triton.bench.machine import OtherPrograms, ended_seconds, resident_mib, tree, tree_seconds

# Each second, of the first GPU.
WATCH_GPU = ("nvidia-smi", "-i=0", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-l=1")

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Of a server's processes together; GPU figures are of the whole GPU, and None where there is none."""

    cpu_seconds: float
    generator_cpu_seconds: float
    other_cores: float  # that other programs used meanwhile
    memory_mib: float  # resident at the end
    gpu_load_percent: float | None
    gpu_memory_mib: float | None  # at the most


def measure_cost(pid: int, work: Callable[[], T]) -> tuple[T, Cost]:
    """What `work` returned, and what it cost the server `pid`. `work` starts the generator, and waits for its end."""
    with gpu_samples() as samples:
        others, ended, used = OtherPrograms(), ended_seconds(), tree_seconds(pid)
        result = work()
        used, ended, other_cores = tree_seconds(pid) - used, ended_seconds() - ended, others.cores()
    return result, Cost(
        used,
        ended,
        other_cores,
        resident_mib(tree(pid)),
        fmean(load for load, _ in samples) if samples else None,
        max(memory for _, memory in samples) if samples else None,
    )


@contextlib.contextmanager
def gpu_samples() -> Iterator[list[tuple[float, float]]]:
    """Filled when the block ends: load in percent and memory in MiB, once a second."""
    samples: list[tuple[float, float]] = []
    if shutil.which(WATCH_GPU[0]) is None:
        yield samples
        return
    watcher = subprocess.Popen(WATCH_GPU, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield samples
    finally:
        watcher.terminate()
        samples += read_samples(watcher.communicate()[0])


def read_samples(output: str) -> list[tuple[float, float]]:
    """The whole lines that nvidia-smi wrote, such as `83, 20481`; the last one may be cut, others may be `[N/A]`."""
    samples = []
    for line in output.rpartition("\n")[0].splitlines():
        with contextlib.suppress(ValueError):
            load, memory = map(float, line.split(","))
            samples.append((load, memory))
    return samples
