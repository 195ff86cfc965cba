"""What a benchmark says of the machine: processor, GPU, memory that processes hold, and the load of other programs."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil


def processor() -> str:
    """The name that the system gives its processor, and how many of it this program may use."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = named[0].partition(":")[2].strip() if named else platform.machine()
    return f"{len(os.sched_getaffinity(0))} x {name}"


def gpu_name() -> str | None:
    """Of the first GPU, where nvidia-smi is."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "-i=0", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def ended_seconds() -> float:
    """Processor time of what this program started and that has ended."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants that live."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def tree_seconds(pid: int) -> float:
    """Processor time of a process and its descendants that live."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def resident_mib(processes: Iterable[psutil.Process]) -> float:
    """Resident memory of `processes` in MiB: the proportional set size (PSS of /proc/PID/smaps_rollup), which divides a
    shared page among the processes that share it, so that a sum counts no page twice."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / (1 << 20)


def foreign_seconds() -> float:
    """Processor time that the machine has spent on anything but this program and what it started."""
    machine = psutil.cpu_times()
    total = float(machine.user + machine.nice + machine.system + machine.irq + machine.softirq)
    return total - tree_seconds(os.getpid()) - ended_seconds()


@dataclass
class OtherPrograms:
    """How many cores were used since this was made, this program and what it started left out."""

    started: float = field(default_factory=time.perf_counter)
    used: float = field(default_factory=foreign_seconds)

    def cores(self) -> float:
        return max(0.0, (foreign_seconds() - self.used) / (time.perf_counter() - self.started))
