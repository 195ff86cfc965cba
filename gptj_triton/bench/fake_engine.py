"""An engine process that computes nothing, to measure all that stands around an engine.

Everything is the real engine process but the runner: every sequence that decodes gets a token a step, always the same
ones. A script that runs this with "$@" is what serve.py takes as --engine-python. Knows no weights and no Triton.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from functools import partial

from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.runner import Choice, Launched
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Sampled, Sequence
from gptj_triton.process import server
from gptj_triton.text.token_bytes import load_token_bytes

NUM_PAGES, PAGE_SIZE = 1 << 16, 16
STEP_TOKENS = 1 << 20  # so that prompts of any length take one step
WORDS = range(300, 350)  # ordinary tokens of any vocabulary


class FakeRunner:
    """A runner without a model; a step takes `step_seconds`, however many sequences there are."""

    steps_ahead = 0
    device = "none"

    def __init__(self, step_seconds: float) -> None:
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        self._step_seconds = step_seconds
        self._next_step = 0.0

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        return False

    def launch(self, step: list[Scheduled]) -> Launched:
        sampling = [scheduled.sequence for scheduled in step if scheduled.samples]
        for scheduled in step:
            self.pool.computed(scheduled.sequence, scheduled.num_tokens)
        return Launched(partial(self._choose, sampling), [])

    def collect(self, launched: Launched) -> list[tuple[Sequence, Choice]]:
        return launched.wait()

    def close(self) -> None:
        """There is nothing to end."""

    def _choose(self, sequences: list[Sequence]) -> list[tuple[Sequence, Choice]]:
        time.sleep(max(0.0, self._next_step - time.monotonic()))
        self._next_step = time.monotonic() + self._step_seconds
        return [(each, [Sampled(WORDS[len(each.output) % len(WORDS)], -1.0)]) for each in sequences]


def load_fake_engine(step_seconds: float, config: EngineConfig) -> Engine:
    """An engine on the runner above, for the vocabulary and the context of a checkpoint."""
    model_config = ModelConfig.read(config.checkpoint, config.context_length, config.max_seq_len)
    tokenizer = find_checkpoint_files(config.tokenizer).find("tokenizer.json")
    token_bytes = load_token_bytes(tokenizer, model_config.vocab_size)
    return Engine(
        FakeRunner(step_seconds),
        model_config,
        token_bytes,
        STEP_TOKENS,
        NUM_PAGES,
        config.max_waiting_requests,
        config.max_waiting_tokens,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Stands in for the engine process, whose arguments it takes, too.")
    parser.add_argument("-m", metavar="MODULE", help="the module in whose place this runs; not read")
    parser.add_argument("--step-ms", type=float, default=0.0, metavar="MS", help="how long a step takes; default: 0")
    options, arguments = parser.parse_known_args()
    return server.main(arguments, partial(load_fake_engine, options.step_ms / 1000))


if __name__ == "__main__":
    sys.exit(main())
