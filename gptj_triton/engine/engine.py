"""The engine: sequences in, steps, finished sequences out. Knows neither processes nor users."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.beam import BeamSearch, BeamStep
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.runner import Choice, Launched
from gptj_triton.engine.sampling_params import Limits, SamplingParams
from gptj_triton.engine.scheduler import Scheduled, Scheduler
from gptj_triton.engine.sequence import Sampled, Sequence


class Runner(Protocol):
    """Computes steps. `steps_ahead` is how many may be in flight when the next one is launched."""

    @property
    def pool(self) -> PagePool: ...
    @property
    def device(self) -> str: ...
    @property
    def steps_ahead(self) -> int: ...
    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool: ...
    def launch(self, step: list[Scheduled]) -> Launched: ...
    def collect(self, launched: Launched) -> list[tuple[Sequence, Choice]]: ...
    def close(self) -> None: ...


class Engine:
    """One model, on one device or several ranks. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        runner: Runner,
        model_config: ModelConfig,
        token_bytes: list[bytes],
        step_tokens: int,
        max_sequences: int,
        max_waiting_requests: int,
        max_waiting_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`token_bytes[id]` is the text of a token in UTF-8, empty where stop strings are not known; a step computes at
        most `step_tokens` tokens of prompts, and at most `max_sequences` run at once. Of what waits, only `refusal`
        knows the limits. `clock` gives seconds, and counts as sequences' moments do.
        """
        self.model_config = model_config
        self.metrics = EngineMetrics()
        self.scheduler = Scheduler(runner.pool, step_tokens, max_sequences, self.metrics)
        self.limits = Limits(
            vocab_size=model_config.vocab_size,
            context_length=model_config.context_length,
            stop_strings=bool(token_bytes),
            num_pages=runner.pool.num_pages,
            page_size=runner.pool.page_size,
            max_sequences=max_sequences,
        )
        self.max_waiting_requests = max_waiting_requests
        self.max_waiting_tokens = max_waiting_tokens
        self._runner = runner
        self._token_bytes = token_bytes
        self._clock = clock
        self._searches: dict[Hashable, BeamSearch] = {}
        self._launched: deque[tuple[Launched, float]] = deque()  # with the moment
        self._collected_at = 0.0

    @property
    def busy(self) -> bool:
        return len(self.scheduler) > 0 or len(self._launched) > 0

    def summary(self) -> str:
        """One line for a log: the device, and how many tokens the KV cache holds."""
        pool = self._runner.pool
        return f"device {self._runner.device}, KV cache of {pool.num_pages * pool.page_size} tokens"

    def refusal(self, num_tokens: int) -> str | None:
        """Why a client's request cannot wait now, in words for its client; None where it can. `num_tokens` are its
        prompts and all that may come of them. A request that finds a place, or is the first to wait, may have any
        number.
        """
        scheduler, line = self.scheduler, self.scheduler.line
        waiting = line.num_requests - max(0, scheduler.max_sequences - len(scheduler.running))
        if waiting >= self.max_waiting_requests:
            limit = f"{waiting} requests wait, the most that may (max_waiting_requests)"
        elif waiting > 0 and line.num_tokens + num_tokens > self.max_waiting_tokens:
            limit = (
                f"requests of {line.num_tokens} tokens wait, this one has {num_tokens}, and at most "
                f"{self.max_waiting_tokens} may wait (max_waiting_tokens)"
            )
        else:
            return None
        return f"too much waits for the engine; please try again later: {limit}"

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence, whose parameters were checked where its request was read."""
        assert sequence.params.fits(sequence.prompt, self.limits), sequence.params
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
            return group * group[0].params.beam_width  # a search that has not begun has one member
        search.finished += group
        return search.result()[: search.params.beam_width]

    def step(self) -> list[list[Sequence]]:
        """Compute one token of every sequence that can have one; returns the requests that ended, best result first.

        Where the runner can, the next step is launched before this one's tokens are known, so that a GPU never waits;
        what a step computed for a sequence that had ended by then is dropped.
        """
        ended = [] if self._runner.can_run_ahead(self.scheduler.begun) else self._collect(leave=0)
        step = self.scheduler.schedule()
        if step:
            began = self._clock()
            self._count_step(step, began)
            launched = self._runner.launch(step)
            self._launched.append((launched, began))
            for prompt in launched.spread:
                self._searches[prompt.key] = BeamSearch(prompt.params)
                self.scheduler.replace([prompt], prompt.group)
        return ended + self._collect(leave=self._runner.steps_ahead if step else 0)

    def test(self) -> None:
        """Generate one token, of which nothing remains: an engine that cannot must not be given requests."""
        self.submit(Sequence("test", [0], SamplingParams(request_output_len=1, end_ids=())))
        while self.busy:
            self.step()
        self.metrics.take()

    def close(self) -> None:
        """End the model's other processes, if it has some. Nothing else may be called afterwards."""
        self._runner.close()

    def check_integrity(self) -> None:
        """Assert that no page of the KV cache leaked."""
        self._runner.pool.check_integrity(self.scheduler)

    def _collect(self, leave: int) -> list[list[Sequence]]:
        """Take the tokens of the steps in flight, except for the `leave` last ones; returns the requests that ended."""
        ended: list[list[Sequence]] = []
        while len(self._launched) > leave:
            launched, began = self._launched.popleft()
            chosen = self._runner.collect(launched)
            # The steps in flight are computed one after another.
            began, self._collected_at = max(began, self._collected_at), self._clock()
            self.metrics.step_time_seconds.observe(self._collected_at - began)
            ended += self._take(chosen)
        return ended

    def _take(self, chosen: list[tuple[Sequence, Choice]]) -> list[list[Sequence]]:
        ended: list[list[Sequence]] = []
        beams: dict[Hashable, list[tuple[Sequence, list[Sampled]]]] = {}
        live = [(sequence, choices) for sequence, choices in chosen if sequence.group[0].finish_reason is None]
        self._count_tokens([each for sequence, choices in live for each in _who_continues(sequence, choices)])
        for sequence, choices in live:
            if isinstance(choices, BeamStep):
                if result := self._follow(sequence, choices):
                    ended.append(result)
                continue
            if sequence.params.beam_width > 1:
                beams.setdefault(sequence.key, []).append((sequence, choices))
                continue
            sequence.append(choices[0].token, choices[0].log_prob, self._token_bytes)
            if sequence.finish_reason is not None:
                self.scheduler.remove([sequence])
                ended.append([sequence])
        ended += [result for candidates in beams.values() if (result := self._branch(candidates))]
        for first, *_ in ended:
            self.metrics.e2e_request_latency_seconds.observe(self._collected_at - first.submitted_at)
        return ended

    def _count_step(self, step: list[Scheduled], now: float) -> None:
        """Note that a step begins now."""
        metrics = self.metrics
        metrics.iteration_tokens_total.observe(sum(scheduled.num_tokens for scheduled in step))
        for sequence in (scheduled.sequence for scheduled in step if not scheduled.sequence.begun_at):
            sequence.begun_at = now
            metrics.request_queue_time_seconds.observe(now - sequence.submitted_at)
            metrics.prompt_tokens_total += len(sequence.prompt)
            metrics.prefix_cache_queries_total += len(sequence.prompt)
            metrics.prefix_cache_hits_total += sequence.num_cached

    def _count_tokens(self, sequences: list[Sequence]) -> None:
        """Note that each of the sequences gets a token now."""
        metrics, now = self.metrics, self._collected_at
        metrics.generation_tokens_total += len(sequences)
        metrics.step_sequences.observe(len(sequences))
        metrics.inter_token_latency_seconds.observe(*[now - each.token_at for each in sequences if each.token_at])
        for each in sequences:
            if not each.token_at:
                metrics.time_to_first_token_seconds.observe(now - each.submitted_at)
            each.token_at = now

    def _follow(self, sequence: Sequence, step: BeamStep) -> list[Sequence]:
        """Let a search's beams take the tokens that a GPU chose for them; returns the search's result if it ended.
        `sequence` is the first beam, or the prompt that became them.
        """
        beams, search = sequence.group, self._searches[sequence.key]
        for beam in beams:
            beam.token_at = sequence.token_at
        if search.follow(step, beams, self._token_bytes):
            return []
        for beam in beams:
            beam.finish_reason = "length"  # so that what a step under way chooses for it is dropped
        self.scheduler.remove(beams)
        return self._searches.pop(sequence.key).result()

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


def _who_continues(sequence: Sequence, choices: Choice) -> list[Sequence]:
    """The sequences for which something was chosen: one, which may be a prompt that becomes beams, or the beams of a
    search that a GPU advances as a whole.
    """
    return sequence.group if isinstance(choices, BeamStep) and sequence is sequence.group[0] else [sequence]
