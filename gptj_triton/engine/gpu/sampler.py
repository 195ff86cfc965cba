"""Chooses tokens on the GPU without waiting for them: the host prepares the next step while this one is computed.

What needs the host (see `can_sample_on_device`) is sampled there, and then no step is launched ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gptj_triton.engine.gpu.sampling import sample as sample_on_device
from gptj_triton.engine.gpu.sampling_state import SamplingState, Work, can_sample_on_device
from gptj_triton.engine.runner import Choices
from gptj_triton.engine.sampler import sample
from gptj_triton.engine.sequence import Sampled, Sequence


class GpuSampler:
    """Keeps one step in flight. `keep_sampled` hands the tokens [samples] to the model, for the next step to read."""

    steps_ahead = 1

    def __init__(self, state: SamplingState, keep_sampled: Callable[[Tensor], None]) -> None:
        """Compiles the kernels for every kind of request, or the first request of each kind would wait for that."""
        self._state = state
        self._keep_sampled = keep_sampled
        logits = torch.zeros(1, state.vocab_size, device=state.device)
        for work in Work.kinds():
            sample_on_device(logits, state, work)

    def can_run_ahead(self, sequences: Iterable[Sequence]) -> bool:
        """True when all of them are sampled on the GPU."""
        return all(can_sample_on_device(sequence.params) for sequence in sequences)

    def start(self, logits: Tensor, sequences: list[Sequence]) -> Callable[[], Choices]:
        """Begin to choose from float32 `logits` [sequences, V], which the next step may overwrite."""
        if not self.can_run_ahead(sequences):
            self._state.clear()
            kept = logits.clone()
            return lambda: sample(kept, sequences)
        self._state.load(sequences)
        tokens, log_probs = sample_on_device(logits, self._state, self._state.work)
        self._keep_sampled(tokens)
        for sequence in sequences:
            sequence.in_flight += 1
        on_host = [tensor.to("cpu", non_blocking=True) for tensor in (tokens, log_probs)]
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> Choices:
            arrived.synchronize()
            for sequence in sequences:
                sequence.in_flight -= 1
            pairs = zip(*(tensor.tolist() for tensor in on_host), strict=True)
            return [[Sampled(*pair)] for pair in pairs]

        return wait
