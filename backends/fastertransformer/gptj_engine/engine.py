"""The engine: sequences in, steps, finished sequences out. Knows neither processes nor users."""

from __future__ import annotations

from collections.abc import Hashable

from gptj_engine.config import EngineConfig, ModelConfig
from gptj_engine.runner import Runner
from gptj_engine.sampling_params import Limits
from gptj_engine.scheduler import Scheduler
from gptj_engine.sequence import Sequence
from gptj_engine.token_bytes import load_token_bytes


class Engine:
    """One model on one device. Not thread-safe: one thread calls everything."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the checkpoint; ConfigError when that cannot be done."""
        self.model = ModelConfig.from_huggingface(config.checkpoint)
        self._token_bytes = load_token_bytes(config.checkpoint, self.model.vocab_size)
        self.limits = Limits(self.model.vocab_size, self.model.context_length, stop_strings=bool(self._token_bytes))
        self._runner = Runner(config, self.model)
        self.scheduler = Scheduler(self._runner.pool, config.step_tokens, config.max_sequences)

    @property
    def busy(self) -> bool:
        return len(self.scheduler) > 0

    def summary(self) -> str:
        """One line for a log: the device, and how many tokens the KV cache holds."""
        pool = self._runner.pool
        return f"device {self._runner.device}, KV cache of {pool.num_pages * pool.page_size} tokens"

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; InvalidRequestError when a field is out of range."""
        sequence.params.check(sequence.prompt, self.limits)
        self.scheduler.add(sequence)

    def cancel(self, key: Hashable) -> Sequence | None:
        """End a sequence now, if it has not ended yet, and return it."""
        sequence = self.scheduler.find(key)
        if sequence is not None:
            sequence.finish_reason = "cancelled"
            self.scheduler.remove(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """Compute one token of every sequence that can have one; returns those that ended."""
        step = self.scheduler.schedule()
        finished = []
        for sequence, sampled in self._runner.run(step):
            sequence.append(sampled.token, sampled.log_prob, self._token_bytes)
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)
                finished.append(sequence)
        return finished

    def check_integrity(self) -> None:
        """Assert that no page of the KV cache leaked."""
        self._runner.pool.check_integrity(self.scheduler)
