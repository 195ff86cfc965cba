"""The engine: sequences in, steps, finished sequences out. Knows neither processes nor users."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.beam import BeamSearch
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.device import choose_device
from gptj_triton.engine.runner import Launched, make_runner
from gptj_triton.engine.sampling_params import Limits
from gptj_triton.engine.scheduler import Scheduler
from gptj_triton.engine.sequence import Sampled, Sequence
from gptj_triton.text.token_bytes import load_token_bytes


class Engine:
    """One model, on one device or several ranks. Not thread-safe: one thread calls everything."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the checkpoint; ConfigError when that cannot be done."""
        config = config.for_device(is_gpu=choose_device(config.device).type == "cuda")
        self.model = ModelConfig.read(config.checkpoint, config.context_length)
        tokenizer = find_checkpoint_files(config.tokenizer).find("tokenizer.json")
        self._token_bytes = load_token_bytes(tokenizer, self.model.vocab_size)
        self._runner = make_runner(config, self.model)
        pool = self._runner.pool
        self.limits = Limits(
            vocab_size=self.model.vocab_size,
            context_length=self.model.context_length,
            stop_strings=bool(self._token_bytes),
            num_pages=pool.num_pages,
            page_size=pool.page_size,
            max_sequences=config.max_sequences,
        )
        self.scheduler = Scheduler(pool, config.step_tokens, config.max_sequences)
        self._searches: dict[Hashable, BeamSearch] = {}
        self._launched: deque[Launched] = deque()

    @property
    def busy(self) -> bool:
        return len(self.scheduler) > 0 or len(self._launched) > 0

    def summary(self) -> str:
        """One line for a log: the device, and how many tokens the KV cache holds."""
        pool = self._runner.pool
        return f"device {self._runner.device}, KV cache of {pool.num_pages * pool.page_size} tokens"

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; InvalidRequestError when a field is out of range."""
        sequence.params.check(sequence.prompt, self.limits)
        self.scheduler.add(sequence)

    def cancel(self, key: Hashable, reason: str = "cancelled") -> list[Sequence]:
        """End a request now, for the finish reason given; returns what there is of it, nothing if it had ended."""
        sequence = self.scheduler.find(key)
        if sequence is None:
            return []
        group = list(sequence.group)
        for member in group:
            member.finish_reason = reason
        self.scheduler.remove(group)
        search = self._searches.pop(key, None)
        if search is None:
            return group
        search.finished += group
        return search.result()[: search.params.beam_width]

    def step(self) -> list[list[Sequence]]:
        """Compute one token of every sequence that can have one; returns the requests that ended, best result first.

        Where the runner can, the next step is launched before this one's tokens are known, so that a GPU never waits;
        what a step computed for a sequence that had ended by then is dropped.
        """
        ended = [] if self._runner.runs_ahead_of(self.scheduler.running) else self._collect(leave=0)
        step = self.scheduler.schedule()
        if step:
            self._launched.append(self._runner.launch(step))
        return ended + self._collect(leave=self._runner.depth if step else 0)

    def _collect(self, leave: int) -> list[list[Sequence]]:
        """Take the tokens of the steps under way, except for the `leave` last ones; returns the requests that ended."""
        ended: list[list[Sequence]] = []
        while len(self._launched) > leave:
            ended += self._take(self._runner.collect(self._launched.popleft()))
        return ended

    def _take(self, chosen: list[tuple[Sequence, list[Sampled]]]) -> list[list[Sequence]]:
        ended: list[list[Sequence]] = []
        beams: dict[Hashable, list[tuple[Sequence, list[Sampled]]]] = {}
        for sequence, choices in chosen:
            if sequence.finish_reason is not None:
                continue
            if sequence.params.beam_width > 1:
                beams.setdefault(sequence.key, []).append((sequence, choices))
                continue
            sequence.append(choices[0].token, choices[0].log_prob, self._token_bytes)
            if sequence.finish_reason is not None:
                self.scheduler.remove([sequence])
                ended.append([sequence])
        return ended + [result for candidates in beams.values() if (result := self._branch(candidates))]

    def _branch(self, candidates: list[tuple[Sequence, list[Sampled]]]) -> list[Sequence]:
        """Put a search's next beams in the place of those that the step computed; returns its result if it ended."""
        first = candidates[0][0]
        search = self._searches.setdefault(first.key, BeamSearch(first.params))
        in_order = sorted(candidates, key=lambda candidate: first.group.index(candidate[0]))
        branches = search.advance(in_order, self._token_bytes)
        beams = [branch.beam for branch in branches]
        for branch in branches:
            self._runner.pool.fork(branch.parent, branch.beam)
            branch.beam.group = beams
        self.scheduler.replace(first.group, beams)
        return [] if beams else self._searches.pop(first.key).result()

    def close(self) -> None:
        """Let go of the model's other processes, if it has some. Nothing else may be called afterwards."""
        self._runner.close()

    def check_integrity(self) -> None:
        """Assert that no page of the KV cache leaked."""
        self._runner.pool.check_integrity(self.scheduler)
