"""Runs steps on a GPU without waiting for them: the host prepares the next step while this one is computed.

Tokens are chosen on the GPU; what needs the host (beams, words of several tokens that must not come) is sampled there,
and then no step is launched ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.device import choose_device
from gptj_triton.engine.gpu.model import GpuModel
from gptj_triton.engine.gpu.sampling import sample as sample_on_device
from gptj_triton.engine.gpu.sampling_state import SamplingState, Work, can_sample_on_device
from gptj_triton.engine.runner import Model, Runner
from gptj_triton.engine.sampler import sample
from gptj_triton.engine.sequence import Sampled, Sequence


class GpuRunner(Runner):
    """A runner that keeps one step under way."""

    depth = 1

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        """Load the model and allocate the KV cache; ConfigError when that cannot be done."""
        super().__init__(config, model)
        logits = torch.zeros(1, model.vocab_size, device=self.device)
        for work in Work.kinds():  # compiled here, or the first request of each kind would wait for it
            sample_on_device(logits, self._state, work)

    def runs_ahead_of(self, sequences: Iterable[Sequence]) -> bool:
        return all(can_sample_on_device(sequence.params) for sequence in sequences)

    def _load(self, config: EngineConfig, model: ModelConfig) -> Model:
        device = choose_device(config.device)
        self._state = SamplingState(config.max_sequences, model.vocab_size, device)
        self._gpu_model = GpuModel(config, model, device)
        return self._gpu_model

    def _choose(self, logits: Tensor, sampling: list[Sequence]) -> Callable[[], list[list[Sampled]]]:
        if not all(can_sample_on_device(sequence.params) for sequence in sampling):
            self._state.clear()
            kept = logits.clone()
            return lambda: sample(kept, sampling)
        self._state.load(sampling)
        tokens, log_probs = sample_on_device(logits, self._state, self._state.work)
        self._gpu_model.keep_sampled(tokens)
        for sequence in sampling:
            sequence.in_flight += 1
        on_host = [tensor.to("cpu", non_blocking=True) for tensor in (tokens, log_probs)]
        arrived = torch.cuda.Event()
        arrived.record()

        def take() -> list[list[Sampled]]:
            arrived.synchronize()
            for sequence in sampling:
                sequence.in_flight -= 1
            pairs = zip(*(tensor.tolist() for tensor in on_host), strict=True)
            return [[Sampled(*pair)] for pair in pairs]

        return take
