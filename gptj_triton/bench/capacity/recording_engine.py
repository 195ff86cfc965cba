"""An engine process on a CPU that writes down its steps: when each began and what it computed.

A script that runs this with "$@" is what serve.py takes as --engine-python. The first line of the file has the engine's
sizes, each other one a step; all are JSON. Knows no Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from gptj_triton.bench.capacity.step_times import Step
from gptj_triton.bench.local_server import LocalServer, local_server
from gptj_triton.bench.streaming import LIFTED
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.device import choose_device
from gptj_triton.engine.eager.sharded_model import ShardedModel
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.load import assemble
from gptj_triton.engine.runner import Model
from gptj_triton.engine.sampler import HostSampler
from gptj_triton.engine.step_plan import StepPlan
from gptj_triton.errors import ConfigError
from gptj_triton.process import server


class RecordingModel:
    """A model, and a file to which each step's beginning and work are written."""

    def __init__(self, model: Model, file: TextIO) -> None:
        self._model = model
        self._file = file

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def page_bytes(self) -> int:
        return self._model.page_bytes

    def allocate(self, num_pages: int) -> None:
        self._model.allocate(num_pages)

    def forward(self, plan: StepPlan) -> Tensor:
        self._file.write(f"{json.dumps([time.monotonic(), *work(plan)])}\n")
        return self._model.forward(plan)

    def measure(self, plan: StepPlan, use: Callable[[Tensor], object]) -> int:
        return self._model.measure(plan, use)

    def close(self) -> None:
        self._model.close()


def work(plan: StepPlan) -> tuple[int, int, int, int, int]:
    """The numbers of a Step."""
    decoding = context = prompt_tokens = prompts = prompt_context = 0
    for group in plan.groups:
        if group.num_tokens == 1:
            decoding += len(group.starts)
            context += sum(group.starts) + len(group.starts)
        else:
            prompt_tokens += group.num_tokens * len(group.starts)
            prompts += len(group.starts)
            prompt_context += group.num_tokens * sum(group.starts)
    return decoding, context, prompt_tokens, prompts, prompt_context


def read_sizes(path: Path) -> dict[str, int]:
    """The engine's sizes."""
    with path.open() as file:
        sizes: dict[str, int] = json.loads(file.readline())
    return sizes


def read_steps(path: Path) -> list[tuple[float, Step]]:
    """The engine's steps, each with the moment at which it began."""
    _, *steps = path.read_text().splitlines()
    return [(began, Step(*numbers)) for began, *numbers in map(json.loads, steps)]


def load_recording_engine(path: Path, config: EngineConfig) -> Engine:
    """The engine that serve.py would load, on a CPU."""
    if choose_device(config.device, 0, config.tensor_para_size).type != "cpu":
        raise ConfigError("steps are recorded on a CPU alone (--device cpu); for a GPU there is benchmark_gpu.py")
    config = config.for_device(is_gpu=False)
    model_config = ModelConfig.read(config.checkpoint, config.context_length, config.max_seq_len)
    file = path.open("w", buffering=1)
    model = RecordingModel(ShardedModel(config, model_config), file)
    engine = assemble(config, model_config, model, HostSampler())
    names = ("num_pages", "page_size", "context_length", "max_sequences")
    sizes = {name: getattr(engine.limits, name) for name in names}
    sizes |= {name: getattr(config, name) for name in ("step_tokens", "max_waiting_requests", "max_waiting_tokens")}
    file.write(f"{json.dumps(sizes)}\n")
    return engine


@contextlib.contextmanager
def recording_server(folder: Path, recording: Path) -> Iterator[LocalServer]:
    """Runs serve.py with the embedded model and an engine that writes to `recording`; no piece of a stream waits for
    its turn. Raises ServerFailedError.
    """
    script = folder / "engine"
    command = [sys.executable, __file__, f"--recording={recording}"]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    script.chmod(0o755)
    with local_server([f"--engine-python={script}", f"--stream-pieces-per-second={LIFTED}"]) as running:
        yield running


def main() -> int:
    parser = argparse.ArgumentParser(description="Stands in for the engine process, whose arguments it takes, too.")
    parser.add_argument("-m", metavar="MODULE", help="the module in whose place this runs; not read")
    parser.add_argument("--recording", type=Path, required=True, metavar="FILE", help="where to write")
    options, arguments = parser.parse_known_args()
    return server.main(arguments, partial(load_recording_engine, options.recording))


if __name__ == "__main__":
    sys.exit(main())
