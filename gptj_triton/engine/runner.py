"""Turns a scheduled step into sampled tokens: plan, forward pass, sampler. Knows neither devices nor weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptj_triton.engine.beam import BeamStep
from gptj_triton.engine.kv_pages import PagePool
from gptj_triton.engine.scheduler import Scheduled
from gptj_triton.engine.sequence import Sampled, Sequence
from gptj_triton.engine.step_plan import StepPlan, plan_step

# What was chosen for a sequence: one token; the best ones of a beam, of which the host chooses; or what a GPU chose for
# all beams of a search.
Choice = list[Sampled] | BeamStep


class Model(Protocol):
    """A model on its devices, however many processes and kernels it is made of."""

    @property
    def device(self) -> torch.device: ...
    @property
    def page_bytes(self) -> int:
        """Memory that one page of the KV cache takes up on each device."""

    def allocate(self, num_pages: int) -> None:
        """Make an empty KV cache of that size, in the place of the one before."""

    def forward(self, plan: StepPlan) -> Tensor:
        """Begin to compute a step; returns float32 logits [samples, V] of the plan's `last_rows`."""

    def measure(self, plan: StepPlan, use: Callable[[Tensor], object]) -> int:
        """Bytes that are left on the fullest GPU when a step is computed and `use` made of its logits."""

    def close(self) -> None:
        """End the model's other processes, if it has some."""


class Sampler(Protocol):
    """Chooses tokens from logits."""

    @property
    def steps_ahead(self) -> int:
        """How many steps may be in flight when the next one is launched."""

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        """Whether the step after one of `sequences` can be launched before that one's tokens are known."""

    def prepare(self, sequences: Iterable[Sequence]) -> None:
        """Make ready for a step of `sequences`, before it is computed."""

    def start(self, logits: Tensor, sequences: list[Sequence]) -> Started:
        """Begin to choose from float32 `logits` [sequences, V], which the next step may overwrite."""


@dataclass(frozen=True)
class Started:
    """A choice that has begun. `wait` returns pairs: a sequence, the first one for all beams of a search that a GPU
    chooses, and what was chosen.

    `places` are the sequences that get the tokens to which the next plan may refer. `spread` are prompts that have
    become searches now: their beams, the `group` of each, are to use its pages.
    """

    wait: Callable[[], list[tuple[Sequence, Choice]]]
    places: list[Sequence]
    spread: list[Sequence]


@dataclass(frozen=True)
class Launched:
    """A step in flight. `wait` is that of Started, and `spread` too."""

    wait: Callable[[], list[tuple[Sequence, Choice]]]
    spread: list[Sequence]


class ModelRunner:
    """Runs steps on a model whose KV cache has the pages that `pool` counts."""

    def __init__(self, model: Model, sampler: Sampler, pool: PagePool) -> None:
        self.pool = pool
        self._model = model
        self._sampler = sampler
        self._sampled: list[Sequence] = []  # those that got tokens of the last step, in order

    @property
    def device(self) -> str:
        return str(self._model.device)

    @property
    def steps_ahead(self) -> int:
        return self._sampler.steps_ahead

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        """Whether the next step can be launched before the tokens of the last one are known."""
        return self._sampler.can_run_ahead(sequences)

    @torch.inference_mode()
    def launch(self, step: SequenceOf[Scheduled]) -> Launched:
        """Begin to compute a step that is not empty."""
        self._sampler.prepare(scheduled.sequence for scheduled in step)
        plan, sampling = plan_step(step, self.pool, self._sampled)
        logits = self._model.forward(plan)
        for scheduled in step:
            self.pool.computed(scheduled.sequence, scheduled.num_tokens)
        if not sampling:
            self._sampled = []
            return Launched(list, [])
        started = self._sampler.start(logits, sampling)
        for prompt in started.spread:
            for beam in prompt.group:
                self.pool.fork(prompt, beam)
        self._sampled = started.places
        return Launched(started.wait, started.spread)

    @torch.inference_mode()
    def collect(self, launched: Launched) -> list[tuple[Sequence, Choice]]:
        """What was chosen in a step, and for which sequences: see Started."""
        return launched.wait()

    def close(self) -> None:
        """End the model's other processes, if it has some."""
        self._model.close()
