"""What `sampling` knows of the rows of a batch: facts of each sequence as tensors on the GPU, and memory to work in.

Knows sequences and their parameters; chooses no tokens. B are the rows of a step, R those there is room for, V the
vocabulary, C its chunks, G its groups.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence

# Rows of the state's whole numbers, int64 [NUM_INTS, R].
POSITION = tl.constexpr(0)  # tokens of prompt and output; -1 where there is no sequence
SEED = tl.constexpr(1)  # the bits of an unsigned number
GREEDY = tl.constexpr(2)
TOP_K = tl.constexpr(3)  # 0 keeps all
TO_MINIMUM = tl.constexpr(4)  # tokens to come before an end id may
SLOT = tl.constexpr(5)  # the row of `counts`; -1 for none
RESET_ID = tl.constexpr(6)
END_IDS = tl.constexpr(7)  # the first of MOST_END_IDS rows; -1 where there are fewer
MOST_END_IDS = tl.constexpr(4)
NUM_INTS = 11

# Rows of its real numbers, float64 [NUM_FLOATS, R].
DIVISOR = tl.constexpr(0)
TOP_P = tl.constexpr(1)
FIRST_TOP_P = tl.constexpr(2)
TOP_P_DECAY = tl.constexpr(3)
LEAST_TOP_P = tl.constexpr(4)
REPETITION = tl.constexpr(5)
PRESENCE = tl.constexpr(6)
FREQUENCY = tl.constexpr(7)
LOG_MIN_P = tl.constexpr(8)
NUM_FLOATS = 9

NOBODY = [-1] + [0] * (NUM_INTS + NUM_FLOATS - 1)
BANNED = -1  # in `counts`


@dataclass(frozen=True)
class Blocks:
    """How the kernels cut their work: powers of two. A group is of `group` ids, and `groups` of them are searched."""

    chunk: int = 1024
    group: int = 16
    groups: int = 512
    whole: int = 8192
    prepare_warps: int = 4
    bound_warps: int = 8
    search_warps: int = 8
    whole_warps: int = 16
    finish_warps: int = 4


@dataclass(frozen=True)
class Work:
    """What some row of a batch asks for; it decides which kernels run. `counts`: penalties or bad words. `draws`: not
    all are greedy. `searches`: top-k, top-p or min-p.
    """

    counts: bool = False
    draws: bool = False
    searches: bool = False

    @staticmethod
    def kinds() -> list[Work]:
        """All that a batch can ask for."""
        choosing = ((False, False), (True, False), (True, True))
        return [Work(counts, draws, searches) for counts in (False, True) for draws, searches in choosing]

    @staticmethod
    def of(params: SequenceOf[SamplingParams]) -> Work:
        """Beams need their logits scaled and kept, as draws do."""
        drawn = [one for one in params if one.beam_width == 1 and not one.greedy]
        return Work(
            counts=any(map(_needs_counts, params)),
            draws=bool(drawn) or any(one.beam_width > 1 for one in params),
            searches=any(one.top_k or one.top_p < 1.0 or one.top_p_decay < 1.0 or one.min_p > 0.0 for one in drawn),
        )


def can_sample_on_device(params: SamplingParams) -> bool:
    """False for what only the host's sampler does: beams (but see can_choose_on_device), bad words of several tokens,
    and a minimum length with more than MOST_END_IDS end ids.
    """
    few_end_ids = params.min_length == 0 or len(params.end_ids) <= MOST_END_IDS.value
    return params.beam_width == 1 and few_end_ids and all(len(word) == 1 for word in params.bad_words_list)


def _needs_counts(params: SamplingParams) -> bool:
    return params.penalised or bool(params.bad_words_list)


class SamplingState:
    """What `sample` knows of the rows, and the memory it works in; the same for every number of rows B <= R.

    `tokens` int32 [2R] and `log_probs` float32 [R] are the last step's results; behind those of the rows is room for
    the tokens of beams that begin. `counts` int32 [R, V] says how often a token stands in a sequence, -1 for one that
    is banned; only rows with penalties or bad words have a slot in it.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, blocks: Blocks | None = None) -> None:
        self.blocks = blocks or Blocks()
        self.vocab_size = vocab_size
        self.device = device
        self.work = Work()
        self._sequences: list[Sequence | None] = []
        self._slots: dict[Sequence, int] = {}
        self._free_slots = list(range(max_rows))
        chunks = triton.cdiv(vocab_size, self.blocks.chunk)
        groups = chunks * self.blocks.chunk // self.blocks.group

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._facts = zeros(NUM_INTS + NUM_FLOATS, max_rows, dtype=torch.int64)
        self._facts[0] = -1
        self.whole, self.real = self._facts[:NUM_INTS], self._facts[NUM_INTS:].view(torch.float64)
        self.counts = zeros(max_rows, vocab_size)
        self.tokens = zeros(2 * max_rows)
        self.log_probs = zeros(max_rows, dtype=torch.float32)
        self.chunk_max = zeros(max_rows, chunks, dtype=torch.float32)
        self.chunk_best = zeros(max_rows, chunks)
        self.chunk_sum = zeros(max_rows, chunks, dtype=torch.float32)
        self.chunk_mass = zeros(max_rows, chunks, dtype=torch.float64)
        self.group_max = zeros(max_rows, groups, dtype=torch.float32)
        self.candidates = zeros(max_rows, self.blocks.groups)
        self.bounds = zeros(max_rows, 2)
        self.thresholds = zeros(max_rows, dtype=torch.float32)
        self.settled = zeros(max_rows)

    @property
    def max_rows(self) -> int:
        return self.log_probs.shape[0]

    def load(self, sequences: SequenceOf[Sequence | None]) -> None:
        """Make `sequences` the rows of the steps to come, in this order; nothing waits for the GPU. A row of None is
        left alone.

        One that was a row until now goes on from what the GPU knows of it, for the host may lag behind. Any other
        begins with what is known of it here.
        """
        if list(sequences) == self._sequences:
            return
        assert len(sequences) <= self.max_rows
        old_rows = {sequence: row for row, sequence in enumerate(self._sequences) if sequence}
        self._sequences = list(sequences)
        self.work = Work.of([sequence.params for sequence in sequences if sequence])
        fresh = [(row, sequence) for row, sequence in enumerate(sequences) if sequence and sequence not in old_rows]
        self._give_slots([sequence for _, sequence in fresh])
        table = np.empty((1 + NUM_INTS + NUM_FLOATS, self.max_rows), np.int64)
        table[1:] = np.array(NOBODY)[:, None]
        table[0] = -1
        table[0, : len(sequences)] = [old_rows.get(sequence, -1) if sequence else -1 for sequence in sequences]
        if fresh:
            rows = [row for row, _ in fresh]
            table[1 : 1 + NUM_INTS, rows] = np.array([self._whole_facts(sequence) for _, sequence in fresh], np.int64).T
            real = np.array([_real_facts(sequence) for _, sequence in fresh], np.float64)
            table[1 + NUM_INTS :, rows] = real.view(np.int64).T
        on_device = self._to_device(torch.from_numpy(table))
        source, facts = on_device[0], on_device[1:]
        carried = self._facts.index_select(1, source.clamp(min=0))
        torch.where(source >= 0, carried, facts, out=self._facts)

    def _whole_facts(self, sequence: Sequence) -> list[int]:
        params = sequence.params
        return [
            sequence.num_tokens,
            params.random_seed - (1 << 64 if params.random_seed >> 63 else 0),
            int(params.greedy or params.beam_width > 1),
            params.top_k if params.top_k < self.vocab_size else 0,
            max(0, params.min_length - len(sequence.output) - sequence.in_flight),
            self._slots.get(sequence, -1),
            params.top_p_reset_ids,
            *(*params.end_ids, *[-1] * MOST_END_IDS.value)[: MOST_END_IDS.value],
        ]

    def _give_slots(self, fresh: list[Sequence]) -> None:
        """Give `fresh` sequences rows of `counts`, and take those of the sequences that are gone."""
        staying = set(self._sequences)
        for gone in [sequence for sequence in self._slots if sequence not in staying]:
            self._free_slots.append(self._slots.pop(gone))
        counted = [sequence for sequence in fresh if _needs_counts(sequence.params)]
        if not counted:
            return
        places: list[int] = []
        banned: list[int] = []
        for sequence in counted:
            slot = self._slots[sequence] = self._free_slots.pop()
            first = slot * self.vocab_size
            places += [first + token for token in sequence.tokens(0, sequence.num_tokens)]
            banned += [first + word[-1] for word in sequence.params.bad_words_list]
        slots = [self._slots[sequence] for sequence in counted]
        packed = self._to_device(torch.tensor(slots + places + banned))
        on_slots, on_places, on_banned = packed.split([len(slots), len(places), len(banned)])
        self.counts.index_fill_(0, on_slots, 0)
        flat = self.counts.view(-1)
        flat.index_add_(0, on_places, torch.ones_like(on_places, dtype=torch.int32))
        flat.index_fill_(0, on_banned, BANNED)

    def _to_device(self, numbers: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return numbers
        return numbers.pin_memory().to(self.device, non_blocking=True)


def _real_facts(sequence: Sequence) -> list[float]:
    params = sequence.params
    return [
        params.divisor,
        sequence.top_p,
        params.top_p,
        params.top_p_decay,
        min(params.top_p_min, params.top_p),
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        params.log_min_p,
    ]
