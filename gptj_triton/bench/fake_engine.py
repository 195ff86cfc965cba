"""An engine process that computes nothing, to measure all that stands around an engine.

It takes the place of `gptj_triton.process.server`, whose messages, frontends and lifetime it has; only the model is
missing. Every sequence gets a token a step, always the same ones. It takes an interpreter's place, too: a
script that runs it with "$@" is what serve.py wants as --engine-python. Knows no weights and no Triton.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque

from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.sampling_params import Limits
from gptj_triton.engine.scheduler import Scheduler
from gptj_triton.engine.sequence import Sequence
from gptj_triton.process import server
from gptj_triton.text.token_bytes import load_token_bytes

NUM_PAGES, PAGE_SIZE = 1 << 16, 16
WORDS = range(300, 350)  # ordinary tokens of any vocabulary


class FakeEngine(Engine):
    """An engine without a model; beams and sampling have no meaning here."""

    def __init__(self, config: EngineConfig, step_seconds: float) -> None:
        """`step_seconds` is how long a step takes, however many sequences there are."""
        self.model = ModelConfig.read(config.checkpoint, config.context_length)
        self.limits = Limits(self.model.vocab_size, self.model.context_length, True, NUM_PAGES, PAGE_SIZE, NUM_PAGES)
        self.scheduler = Scheduler(PagePool(NUM_PAGES, PAGE_SIZE), config.step_tokens, NUM_PAGES)
        tokenizer = find_checkpoint_files(config.tokenizer).find("tokenizer.json")
        self._token_bytes = load_token_bytes(tokenizer, self.model.vocab_size)
        self._searches = {}
        self._launched = deque()
        self._step_seconds = step_seconds
        self._next_step = 0.0

    def summary(self) -> str:
        return f"no model, {1000 * self._step_seconds:g} ms a step"

    def step(self) -> list[list[Sequence]]:
        """A token for every sequence; returns those that ended."""
        time.sleep(max(0.0, self._next_step - time.monotonic()))
        self._next_step = time.monotonic() + self._step_seconds
        self.scheduler.running += self.scheduler.waiting
        self.scheduler.waiting.clear()
        for sequence in self.scheduler.running:
            sequence.append(WORDS[len(sequence.output) % len(WORDS)], -1.0, self._token_bytes)
        ended = [sequence for sequence in self.scheduler.running if sequence.finish_reason is not None]
        if ended:
            self.scheduler.remove(ended)
        return [[sequence] for sequence in ended]

    def close(self) -> None:
        """There is nothing to let go of."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Stands in for gptj_triton.process.server, whose arguments it takes, too."
    )
    parser.add_argument("-m", metavar="MODULE", help="the module in whose place this runs; not read")
    parser.add_argument("--step-ms", type=float, default=0.0, metavar="MS", help="how long a step takes; default: 0")
    options, arguments = parser.parse_known_args()
    return server.main(arguments, lambda config: FakeEngine(config, options.step_ms / 1000))


if __name__ == "__main__":
    sys.exit(main())
