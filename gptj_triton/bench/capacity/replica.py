"""One server in simulated time: the real engine and its scheduler on a runner whose steps take the time that a model of
steps says. Knows neither where requests come from nor what is made of the times.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from gptj_triton.bench.capacity.step_times import Step, StepTimes
from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.engine import Engine
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.runner import Choice, Launched
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Sampled, Sequence

VOCABULARY = 1 << 31  # prompts are numbers, so that no two are alike
CHOSEN = [Sampled(0, 0.0)]


@dataclass(frozen=True)
class Arrival:
    """A request: when it is sent, in seconds, and its lengths in tokens. The first `shared` tokens of a prompt are
    those of every other one.
    """

    at: float
    prompt: int
    output: int
    shared: int = 0


@dataclass(eq=False)
class Served:
    """What became of a request: when its tokens came, none if it was refused."""

    arrival: Arrival
    tokens: list[float] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        return not self.tokens

    @property
    def ended_at(self) -> float:
        return self.tokens[-1] if self.tokens else self.arrival.at


@dataclass(frozen=True)
class Settings:
    """Of an engine and of what stands around it. `own_seconds` pass with a request outside the engine."""

    num_pages: int
    page_size: int
    context_length: int
    step_tokens: int
    max_sequences: int
    max_waiting_requests: int
    max_waiting_tokens: int
    steps_ahead: int
    own_seconds: float


class Clock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Usage:
    """What a replica did: how long it computed, and how full it was."""

    busy: float = 0.0
    steps: int = 0
    sequences: float = 0.0  # times seconds, as is the next
    pages: float = 0.0
    preemptions: int = 0


class SimulatedRunner:
    """Computes no tokens and takes no time but the simulated one."""

    device = "simulated"

    def __init__(self, times: StepTimes, settings: Settings, clock: Clock, seed: int) -> None:
        self.pool = PagePool(settings.num_pages, settings.page_size)
        self.steps_ahead = settings.steps_ahead
        self.token_times: dict[object, list[float]] = defaultdict(list)
        self.usage = Usage()
        self._times = times
        self._clock = clock
        self._chance = random.Random(seed)
        self._free_at = 0.0

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        return self.steps_ahead > 0

    def launch(self, step: list[Scheduled]) -> Launched:
        decoding = context = prompt_tokens = prompts = prompt_context = 0
        sampling = []
        for scheduled in step:
            sequence, tokens = scheduled.sequence, scheduled.num_tokens
            if tokens == 1:
                decoding += 1
                context += sequence.num_cached + 1
            else:
                prompt_tokens += tokens
                prompts += 1
                prompt_context += tokens * sequence.num_cached
            if scheduled.samples:
                sampling.append(sequence)
            self.pool.computed(sequence, tokens)
        for sequence in sampling:
            sequence.in_flight += 1
        self.pool.copies.clear()
        seconds = self._times.seconds(Step(decoding, context, prompt_tokens, prompts, prompt_context), self._chance)
        ended_at = self._free_at = max(self._clock.now, self._free_at) + seconds
        self._count(seconds, len(step))

        def wait() -> list[tuple[Sequence, Choice]]:
            self._clock.now = max(self._clock.now, ended_at)
            for sequence in sampling:
                sequence.in_flight -= 1
                self.token_times[sequence.key].append(self._clock.now)
            return [(sequence, CHOSEN) for sequence in sampling]

        return Launched(wait, [])

    def collect(self, launched: Launched) -> list[tuple[Sequence, Choice]]:
        return launched.wait()

    def close(self) -> None:
        """There is nothing to end."""

    def _count(self, seconds: float, sequences: int) -> None:
        usage = self.usage
        usage.busy += seconds
        usage.steps += 1
        usage.sequences += seconds * sequences
        usage.pages += seconds * (self.pool.num_pages - self.pool.num_free)


class Replica:
    """Serves requests in simulated time, as the engine's process does: it takes what has come between two steps."""

    def __init__(self, times: StepTimes, settings: Settings, seed: int = 0) -> None:
        self._clock = Clock()
        self._settings = settings
        self._runner = SimulatedRunner(times, settings, self._clock, seed)
        self.engine = Engine(
            self._runner,
            ModelConfig(VOCABULARY, settings.context_length, 1, 1, 1, 1, 1, 1e-5, 0, ()),
            [],
            settings.step_tokens,
            settings.max_sequences,
            settings.max_waiting_requests,
            settings.max_waiting_tokens,
            self._clock,
        )
        self._inbox: list[tuple[float, int, Served]] = []
        self._open: dict[object, Served] = {}
        self._ending: list[float] = []  # a heap: moments at which requests end that steps have computed already
        self._number = 0

    @property
    def usage(self) -> Usage:
        usage = self._runner.usage
        usage.preemptions = self.engine.metrics.num_preemptions_total
        return usage

    @property
    def waiting(self) -> bool:
        """Whether a request has not begun to be served."""
        return bool(self._inbox) or len(self.engine.scheduler.line) > 0

    def connections(self, at: float) -> int:
        """Requests that are open at a moment up to which it has been run."""
        while self._ending and self._ending[0] <= at:
            heapq.heappop(self._ending)
        return len(self._inbox) + len(self._open) + len(self._ending)

    def send(self, arrival: Arrival) -> Served:
        """Take a request, to be served from its moment on."""
        served = Served(arrival)
        self._number += 1
        heapq.heappush(self._inbox, (arrival.at + self._settings.own_seconds, self._number, served))
        return served

    def run(self, until: float) -> None:
        """Compute all steps that begin before `until`."""
        clock, engine = self._clock, self.engine
        while clock.now < until:
            if not engine.busy:
                if not self._inbox or self._inbox[0][0] >= until:
                    return
                clock.now = max(clock.now, self._inbox[0][0])
            while self._inbox and self._inbox[0][0] <= clock.now:
                moment, number, served = heapq.heappop(self._inbox)
                self._submit(moment, number, served)
            if engine.busy:
                self._end(engine.step())

    def _submit(self, moment: float, number: int, served: Served) -> None:
        arrival = served.arrival
        if self.engine.refusal(arrival.prompt + arrival.output) is not None:
            return
        params = SamplingParams(request_output_len=arrival.output, end_ids=())
        prompt = [0] * arrival.shared + [number] * (arrival.prompt - arrival.shared)
        self._open[number] = served
        served.tokens = self._runner.token_times[number]
        self.engine.submit(Sequence(number, prompt, params, submitted_at=moment))

    def _end(self, ended: list[list[Sequence]]) -> None:
        for [sequence] in ended:
            del self._open[sequence.key], self._runner.token_times[sequence.key]
            heapq.heappush(self._ending, self._clock.now)
