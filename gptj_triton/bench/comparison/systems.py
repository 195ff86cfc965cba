"""What is compared: how each system is started, and the doors that it answers at. Does not know how it is measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.bench.local_server import free_ports, local_server, running
from gptj_triton.client import MODEL, STREAMING_MODEL
from gptj_triton.engine.config import cpu_settings

BASELINE = Path(__file__).resolve().parents[1] / "baseline_server.py"
READY_SECONDS = 300.0  # for a model of many gigabytes
BEFORE, BATCHED, AFTER, STREAMED = "before", "before, batched", "after", "after, streamed"
BATCH_SIZE = 64


@dataclass(frozen=True)
class Setting:
    """What all systems have in common, and the interpreters that they run on."""

    model: Path
    device: str
    data_type: str | None
    engine_python: str | None
    baseline_python: str

    @property
    def arguments(self) -> list[str]:
        """Options that serve.py and baseline_server.py share."""
        arguments = [f"--model={self.model}", f"--device={self.device}"]
        return [*arguments, f"--data-type={self.data_type}"] if self.data_type else arguments


@dataclass(frozen=True)
class Running:
    """A server that is ready: its process, and the URL of each of its doors by the system's name."""

    pid: int
    doors: dict[str, str]


@contextlib.contextmanager
def start_baseline(setting: Setting, name: str) -> Iterator[Running]:
    """The baseline, with as many threads as the engine has. Raises ServerFailedError."""
    [port] = free_ports(1)
    command = [setting.baseline_python, str(BASELINE), *setting.arguments, f"--port={port}"]
    if name == BATCHED:
        command.append(f"--batch-size={BATCH_SIZE}")
    with running(BASELINE.name, command, READY_SECONDS, cpu_settings() | os.environ) as pid:
        yield Running(pid, {name: f"http://127.0.0.1:{port}/generate"})


@contextlib.contextmanager
def start_ensembles(setting: Setting) -> Iterator[Running]:
    """This project's server. Raises ServerFailedError."""
    arguments = [*setting.arguments, *([f"--engine-python={setting.engine_python}"] if setting.engine_python else [])]
    with local_server(arguments, READY_SECONDS) as server:
        models = f"http://{server.http}/v2/models"
        doors = {AFTER: f"{models}/{MODEL}/generate", STREAMED: f"{models}/{STREAMING_MODEL}/generate_stream"}
        yield Running(server.pid, doors)


def in_turn(setting: Setting) -> Iterator[contextlib.AbstractContextManager[Running]]:
    """Each system once, to be entered and left before the next, so that one has the machine for itself."""
    yield start_baseline(setting, BEFORE)
    yield start_baseline(setting, BATCHED)
    yield start_ensembles(setting)
