"""How one sequence is to be continued, with every range checked in one place. Knows no tensors.

Names and meanings are FasterTransformer's (its GPT-J inputs), except where a field is marked as this engine's own.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from gptj_triton.errors import InvalidRequestError

MAX_TOP_K = 1024
MAX_BEAM_WIDTH = 64
LARGEST_PENALTY = 1000.0  # far beyond any use, and logits stay finite
LARGEST_LENGTH_PENALTY = 10.0


class Limits(msgspec.Struct, frozen=True):
    """What a model can be asked for: token ids below `vocab_size`, `context_length` tokens of prompt and output
    together.

    `stop_strings` says whether the engine knows the text of the tokens; `num_pages` of `page_size` tokens are the
    whole KV cache, and `max_sequences` run at once at most.
    """

    vocab_size: int
    context_length: int
    stop_strings: bool
    num_pages: int
    page_size: int
    max_sequences: int


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters of one sequence; lengths count tokens.

    `top_k` 0 and `top_p` 0 mean greedy, as does `temperature` 0. `repetition_penalty` multiplies or divides the logit
    of every distinct token of prompt and output, `presence_penalty` is subtracted from it once, `frequency_penalty`
    once an occurrence. `stop_strings` (this engine's own) are matched on the bytes of the new text; `stop_words` and
    `bad_words` are token sequences. With `beam_width` above 1 nothing is drawn: see `beam`. `top_p_decay`, `top_p_min`
    and `top_p_reset_id` are factual nucleus sampling (Lee et al., 2022, arXiv:2206.04624).
    """

    request_output_len: int
    end_id: int
    min_length: int = 0
    runtime_top_k: int = 0
    runtime_top_p: float = 0.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    random_seed: int = 0
    beam_width: int = 1
    len_penalty: float = 0.0
    beam_search_diversity_rate: float = 0.0
    top_p_decay: float = 1.0
    top_p_min: float = 1e-6
    top_p_reset_id: int = -1
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_words: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[bytes, ...] = ()
    is_return_log_probs: bool = False

    @property
    def divisor(self) -> float:
        """What logits are divided by; the choice of the one most probable token needs none."""
        plain = self.temperature == 0.0 or (self.greedy and self.beam_width == 1)
        return 1.0 if plain else self.temperature + 1e-6

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or (self.runtime_top_k == 0 and self.runtime_top_p == 0.0)

    @property
    def top_k(self) -> int:
        """Tokens that top-k keeps, clipped as FasterTransformer clips; 0 keeps all."""
        return min(self.runtime_top_k, MAX_TOP_K)

    @property
    def top_p(self) -> float:
        """Probability mass that top-p keeps; top-k alone keeps all of its tokens."""
        return self.runtime_top_p if self.runtime_top_p > 0.0 else 1.0

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def most_pages(self, prompt_length: int, page_size: int) -> int:
        """Pages of the KV cache that the request can come to use, when its beams share those of the prompt."""
        whole = -(-(prompt_length + self.request_output_len) // page_size)
        shared = prompt_length // page_size
        return whole + (self.beam_width - 1) * (whole - shared)

    def check(self, prompt: list[int], limits: Limits) -> None:
        """Raise InvalidRequestError for the first field that is out of range, given the prompt's token ids."""
        context = limits.context_length
        room = context - len(prompt)
        vocabulary = f"token ids from 0 to {limits.vocab_size - 1}"
        _require("input_lengths", len(prompt), 1, context - 1, f"1 to {context - 1}, one less than the context")
        for token in (min(prompt), max(prompt)):
            _require("input_ids", token, 0, limits.vocab_size - 1, vocabulary)
        _require(
            "request_output_len", self.request_output_len, 1, room, f"1 to {room}, what the prompt leaves of {context}"
        )
        _require("min_length", self.min_length, 0, self.request_output_len)
        _require("end_id", self.end_id, 0, limits.vocab_size - 1)
        _require("runtime_top_k", self.runtime_top_k, 0, math.inf, "0 or more")
        _require("runtime_top_p", self.runtime_top_p, 0.0, 1.0)
        _require("temperature", self.temperature, 0.0, _LARGEST, "a finite number >= 0")
        _require("repetition_penalty", self.repetition_penalty, 1 / LARGEST_PENALTY, LARGEST_PENALTY)
        _require("presence_penalty", self.presence_penalty, -LARGEST_PENALTY, LARGEST_PENALTY)
        _require("frequency_penalty", self.frequency_penalty, -LARGEST_PENALTY, LARGEST_PENALTY)
        _require("beam_width", self.beam_width, 1, min(MAX_BEAM_WIDTH, limits.max_sequences))
        _require("len_penalty", self.len_penalty, -LARGEST_LENGTH_PENALTY, LARGEST_LENGTH_PENALTY)
        diversity = self.beam_search_diversity_rate
        _require("beam_search_diversity_rate", diversity, -LARGEST_PENALTY, LARGEST_PENALTY)
        pages = self.most_pages(len(prompt), limits.page_size)
        if pages > limits.num_pages:
            allowed = f"fewer beams or tokens: they need {pages} pages of the KV cache, which has {limits.num_pages}"
            raise InvalidRequestError("beam_width", self.beam_width, allowed)
        _require("top_p_decay", self.top_p_decay, _SMALLEST, 1.0, "more than 0, at most 1")
        _require("top_p_min", self.top_p_min, _SMALLEST, 1.0, "more than 0, at most 1")
        for name, words in (("bad_words_list", self.bad_words), ("stop_words_list", self.stop_words)):
            for token in (token for word in words for token in word):
                _require(name, token, 0, limits.vocab_size - 1, vocabulary)
        if b"" in self.stop_strings:
            raise InvalidRequestError("stop_strings", "an empty string", "strings of one character or more")
        if self.stop_strings and not limits.stop_strings:
            raise InvalidRequestError("stop_strings", "given", "none: the checkpoint has no byte-level tokenizer.json")


_LARGEST = 3.4e38  # of float32
_SMALLEST = 1e-30


def _require(field: str, value: float, low: float, high: float, allowed: str | None = None) -> None:
    if not low <= value <= high:  # false for NaN, too
        raise InvalidRequestError(field, _plain(value), allowed or f"{_plain(low)} to {_plain(high)}")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
