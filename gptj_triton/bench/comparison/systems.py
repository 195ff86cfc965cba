"""What is compared: the name of each system, how it is started, and its endpoints. Does not know how it is measured."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.bench.local_server import free_ports, local_server, running
from gptj_triton.client import MODEL, STREAMING_MODEL
from gptj_triton.engine.config import cpu_settings

BASELINE_SERVER = Path(__file__).resolve().parents[1] / "baseline_server.py"
READY_SECONDS = 300.0  # for a model of many gigabytes
BASELINE, BATCHED, THIS, STREAMED = "FastAPI + transformers", "the same, batched", "this", "this, streamed"
NAMES = (BASELINE, BATCHED, THIS, STREAMED)
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
    """A server that is ready: its process, and the URL of each endpoint by the system's name."""

    pid: int
    endpoints: dict[str, str]


@dataclass(frozen=True)
class Server:
    """One server, and the systems of the comparison that are its endpoints. `at_once` is how many requests it computes
    together, sys.maxsize where there is no
    limit for a comparison; `start` runs it until the block ends, and raises ServerFailedError."""

    names: tuple[str, ...]
    at_once: int
    start: Callable[[], contextlib.AbstractContextManager[Running]]


def servers(setting: Setting) -> tuple[Server, ...]:
    """All of them. One is started after another has ended, so that each has the machine for itself."""
    return (
        Server((BASELINE,), 1, functools.partial(start_baseline, setting, BASELINE, 1)),
        Server((BATCHED,), BATCH_SIZE, functools.partial(start_baseline, setting, BATCHED, BATCH_SIZE)),
        Server((THIS, STREAMED), sys.maxsize, functools.partial(start_this, setting)),
    )


@contextlib.contextmanager
def start_baseline(setting: Setting, name: str, batch_size: int) -> Iterator[Running]:
    """The baseline, with as many threads as the engine has. Raises ServerFailedError."""
    [port] = free_ports(1)
    options = [*setting.arguments, f"--port={port}", f"--batch-size={batch_size}"]
    command = [setting.baseline_python, str(BASELINE_SERVER), *options]
    with running(BASELINE_SERVER.name, command, READY_SECONDS, cpu_settings() | os.environ) as process:
        yield Running(process.pid, {name: f"http://127.0.0.1:{port}/generate"})


@contextlib.contextmanager
def start_this(setting: Setting) -> Iterator[Running]:
    """This project's server. Raises ServerFailedError."""
    arguments = [*setting.arguments, *([f"--engine-python={setting.engine_python}"] if setting.engine_python else [])]
    with local_server(arguments, READY_SECONDS) as server:
        models = f"http://{server.http}/v2/models"
        endpoints = {THIS: f"{models}/{MODEL}/generate", STREAMED: f"{models}/{STREAMING_MODEL}/generate_stream"}
        yield Running(server.pid, endpoints)
