"""How one sequence is to be continued, and whether a model can do that. Knows no tensors and no ranges of fields.

Names are those of the tensors in the table of request fields; meanings are FasterTransformer's, where it has them.
"""

from __future__ import annotations

import math

import msgspec

from gptj_triton.text.end_ids import fill_id

MAX_TOP_K = 1024


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

    Each of `end_ids` ends the sequence, but not before `min_length` tokens; there may be none. `runtime_top_k` 0,
    `runtime_top_p` 0 and `min_p` 0 mean greedy, as does `temperature` 0. `min_p` (this engine's own;
    Nguyen et al., 2024, arXiv:2407.01082) keeps tokens at least that share as probable as the best one.
    `repetition_penalty` multiplies or divides the logit of every distinct token of prompt and output,
    `presence_penalty` is subtracted from it once, `frequency_penalty` once an occurrence. `stop_strings` (this engine's
    own) are matched on the bytes of the new text; `stop_words_list` and `bad_words_list` are token sequences. With
    `beam_width` above 1 nothing is drawn: see engine/beam.py. `top_p_decay`, `top_p_min` and `top_p_reset_ids` are
    factual nucleus sampling (Lee et al., 2022, arXiv:2206.04624).
    """

    request_output_len: int
    end_ids: tuple[int, ...]
    min_length: int = 0
    runtime_top_k: int = 0
    runtime_top_p: float = 0.0
    min_p: float = 0.0
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
    top_p_reset_ids: int = -1
    bad_words_list: tuple[tuple[int, ...], ...] = ()
    stop_words_list: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[bytes, ...] = ()
    is_return_log_probs: bool = False

    @property
    def fill_id(self) -> int:
        """The token that stands behind a sequence where a tensor has room for more."""
        return fill_id(self.end_ids)

    @property
    def beam_choices(self) -> int:
        """How many of a beam's best tokens must be known, for all beams to go on though the end ids are among them."""
        return (1 + max(1, len(self.end_ids))) * self.beam_width

    @property
    def divisor(self) -> float:
        """What logits are divided by; the choice of the one most probable token needs none."""
        plain = self.temperature == 0.0 or (self.greedy and self.beam_width == 1)
        return 1.0 if plain else self.temperature + 1e-6

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or (self.runtime_top_k, self.runtime_top_p, self.min_p) == (0, 0.0, 0.0)

    @property
    def top_k(self) -> int:
        """Tokens that top-k keeps, clipped as FasterTransformer clips; 0 keeps all."""
        return min(self.runtime_top_k, MAX_TOP_K)

    @property
    def top_p(self) -> float:
        """Probability mass that top-p keeps; top-k alone keeps all of its tokens."""
        return self.runtime_top_p if self.runtime_top_p > 0.0 else 1.0

    @property
    def log_min_p(self) -> float:
        """What a logit may be below the best one, as a number <= 0; -inf keeps all."""
        return math.log(self.min_p) if self.min_p > 0.0 else -math.inf

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def most_tokens(self, prompt_length: int) -> int:
        """Tokens of the prompt, and all that may be generated."""
        return prompt_length + self.request_output_len * self.beam_width

    def most_pages(self, prompt_length: int, page_size: int) -> int:
        """Pages of the KV cache that the request can come to use, when its beams share those of the prompt."""
        whole = -(-(prompt_length + self.request_output_len) // page_size)
        shared = prompt_length // page_size
        return whole + (self.beam_width - 1) * (whole - shared)

    def fits(self, prompt: list[int], limits: Limits) -> bool:
        """Whether a model with `limits` can continue `prompt` by these parameters. Messages for users are made where
        requests are read; the engine only relies on this.
        """
        words = (*self.bad_words_list, *self.stop_words_list)
        tokens = (*prompt, *self.end_ids, *(token for word in words for token in word))
        return (
            1 <= len(prompt) <= limits.context_length - self.request_output_len
            and 0 <= self.min_length <= self.request_output_len
            and self.request_output_len >= 1
            and 0 <= min(tokens) <= max(tokens) < limits.vocab_size
            and 1 <= self.beam_width <= limits.max_sequences
            and self.most_pages(len(prompt), limits.page_size) <= limits.num_pages
            and (limits.stop_strings or not self.stop_strings)
        )
