"""What the GPU knows of the searches whose beams it chooses, and how the host says and reads it.

Knows sequences and their parameters; chooses nothing. N are the searches of a batch; a search has a slot as long as its
beams have pages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from gptj_triton.engine.beam import BeamStep
from gptj_triton.engine.gpu.sampling_state import MOST_END_IDS
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sampled, Sequence

MOST_BEAMS = tl.constexpr(16)
MOST_CHOICES = tl.constexpr(128)  # of a beam: a power of two, and enough for MOST_BEAMS and MOST_END_IDS

# Facts of a search in a batch, int64 [N, NUM_FACTS].
FIRST_ROW = tl.constexpr(0)
NUM_ROWS = tl.constexpr(1)  # one when the search begins, then as many as it has beams
WIDTH = tl.constexpr(2)
NUM_CHOICES = tl.constexpr(3)  # of each beam
REST_PLACE = tl.constexpr(4)  # of the token of the second beam, when the search begins
SEARCH_SLOT = tl.constexpr(5)
LENGTH = tl.constexpr(6)  # tokens of the output before this one; -1 - length where this one is the last
DIVERSITY_RATE = tl.constexpr(7)  # the bits of a float64
NUM_FACTS = tl.constexpr(8)

# A choice: how many go on, how many ended; then for each of MOST_BEAMS that go on, and of as many that ended, the beam
# that it continues, the token, and the bits of its float32 log-probability.
CHOICE_INTS = tl.constexpr(2 + 2 * 16 * 3)


def can_choose_on_device(params: SamplingParams, vocab_size: int) -> bool:
    """Whether a search can be kept on the GPU: what the host alone knows of text ends none of its beams, and there are
    tokens enough for all of them.
    """
    return (
        1 < params.beam_width <= MOST_BEAMS.value
        and len(params.end_ids) <= MOST_END_IDS.value
        and params.request_output_len > 1
        and params.beam_choices <= min(vocab_size, MOST_CHOICES.value)
        and not (params.penalised or params.bad_words_list or params.stop_words_list or params.stop_strings)
    )


class BeamState:
    """Slots of searches. `cache_indirection` uint8 [slots, MOST_BEAMS, context] says in which beam's pages a token of
    the output has its K and V, for each beam; `cum_log_probs` float64 [slots, MOST_BEAMS]. The others hold what the
    kernels of a step pass to each other.
    """

    def __init__(self, cache_indirection: Tensor) -> None:
        slots, device = cache_indirection.shape[0], cache_indirection.device
        self.cache_indirection = cache_indirection
        self.cum_log_probs = torch.zeros(slots, MOST_BEAMS.value, dtype=torch.float64, device=device)
        shape = (slots, MOST_BEAMS.value, MOST_CHOICES.value)
        self.tokens = torch.zeros(shape, dtype=torch.int32, device=device)
        self.log_probs = torch.zeros(shape, device=device)
        self.choices = torch.zeros(slots, CHOICE_INTS.value, dtype=torch.int32, device=device)
        self._holders: list[Sequence | None] = [None] * slots

    def take_slot(self, beams: list[Sequence]) -> None:
        """Give a search a slot that no other needs any more."""
        for slot, holder in enumerate(self._holders):
            if holder is None or holder.search_slot != slot or holder.finish_reason is not None:
                self._holders[slot] = beams[0]
                for beam in beams:
                    beam.search_slot = slot
                return
        raise AssertionError("more searches have pages than sequences may run")

    def load(self, beams: list[Sequence]) -> None:
        """Say what the host knows of a search without a slot: one that is computed again, each beam in its own
        pages.
        """
        self.take_slot(beams)
        slot, count, length = beams[0].search_slot, len(beams), len(beams[0].output)
        totals = torch.tensor([beam.cum_log_prob for beam in beams], dtype=torch.float64)
        self.cum_log_probs[slot, :count] = self.to_device(totals)
        self.cache_indirection[slot, :count, :length] = self.to_device(torch.arange(count, dtype=torch.uint8))[:, None]

    def to_device(self, numbers: Tensor) -> Tensor:
        """The numbers on the GPU; nothing waits for them."""
        device = self.cum_log_probs.device
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def search_facts(
    sequence: Sequence, first_row: int, num_rows: int, rest_place: int
) -> tuple[int, int, int, int, int, int, int, int]:
    """The row of facts of a search, of which `sequence` is a beam; no step for it may be under way but one."""
    params, length = sequence.params, len(sequence.output) + sequence.in_flight
    (rate,) = struct.unpack("q", struct.pack("d", params.beam_search_diversity_rate))
    is_last = length + 1 == params.request_output_len
    return (
        first_row,
        num_rows,
        params.beam_width,
        params.beam_choices,
        rest_place,
        sequence.search_slot,
        -1 - length if is_last else length,
        rate,
    )


def read_choices(choices: NDArray[np.int32]) -> list[BeamStep]:
    """What `choose_beams` returned, int32 [N, CHOICE_INTS], on the host."""
    counts = choices[:, :2].tolist()
    entries = choices[:, 2:].reshape(len(choices), 2, MOST_BEAMS.value, 3)
    parents_and_tokens, log_probs = entries[..., :2].tolist(), entries[..., 2].copy().view(np.float32).tolist()

    def some(search: int, kind: int) -> list[tuple[int, Sampled]]:
        return [
            (parent, Sampled(token, log_prob))
            for (parent, token), log_prob in zip(
                parents_and_tokens[search][kind][: counts[search][kind]], log_probs[search][kind], strict=False
            )
        ]

    return [BeamStep(some(search, 0), some(search, 1)) for search in range(len(choices))]


def most_offers(params: SamplingParams) -> int:
    """How many continuations the beams of a search offer in a step."""
    return params.beam_width * params.beam_choices


def unslotted(sequences: Iterable[Sequence]) -> list[list[Sequence]]:
    """The searches among `sequences` that have no slot."""
    return [each.group for each in sequences if each.keeps_pages and each.search_slot < 0 and each is each.group[0]]
