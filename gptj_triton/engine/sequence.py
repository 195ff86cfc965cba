"""One sequence on its way through the engine: the facts about it, and what follows from them. Knows no tensors.

A request of a user becomes one sequence for each row and each returned sequence.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from gptj_triton.engine.bad_words import BadWords, compile_bad_words
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.text.stop_sequences import StopSequences, StopState, compile_stop_strings, compile_stop_words


@dataclass(frozen=True)
class Sampled:
    """The token and its natural log-probability, after penalties and before top-k and top-p."""

    token: int
    log_prob: float


@dataclass(eq=False)
class Request:
    """What a client asked for at once. Its sequences take turns as one, however many they are.

    `num_tokens` are those of its prompts and all that may come of them; who asks for one sequence need not say them.
    `begun` is true once a step was to compute one of its sequences.
    """

    num_tokens: int = 0
    begun: bool = False


@dataclass(eq=False)
class Sequence:
    """`num_cached` tokens of prompt + output have their K and V in `pages`, or will have when the steps under way are
    done; the others are yet to be computed.

    `group` holds the sequences that must decode in the same step: this one alone, or all beams of a search.
    `in_flight` counts tokens that steps under way will add: they have a position, but nobody knows them yet. Moments
    are those of time.monotonic(), 0 for what has not happened.

    A GPU that chooses the beams of a search leaves K and V where they are: each beam `keeps_pages`, and writes to them
    whatever it continues. `search_slot` is where the GPU keeps the search, with whose pages hold which token of the
    output; -1 for nowhere: then each beam's own hold all of it, once they are computed.
    """

    key: Hashable
    prompt: list[int]
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    num_shared: int = 0  # pages that others may use too
    in_flight: int = 0
    group: list[Sequence] = field(default_factory=list)
    keeps_pages: bool = False
    search_slot: int = -1
    top_p: float = 1.0
    finish_reason: str | None = None
    submitted_at: float = field(default_factory=time.monotonic)
    begun_at: float = 0.0  # the first step that computes it
    token_at: float = 0.0  # its last token
    request: Request = field(default_factory=Request)
    _bad_words: BadWords = field(init=False, repr=False)
    _stop_words: StopSequences[tuple[int, ...]] = field(init=False, repr=False)
    _stop_strings: StopSequences[bytes] = field(init=False, repr=False)
    _stop_word_state: StopState = field(init=False, repr=False)
    _stop_string_state: StopState = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.top_p = self.params.top_p
        self.group = [self]
        self.request.num_tokens = self.request.num_tokens or self.most_tokens
        self._bad_words = compile_bad_words(self.params.bad_words_list)
        self._stop_words = compile_stop_words(self.params.stop_words_list)
        self._stop_strings = compile_stop_strings(self.params.stop_strings)
        self._stop_word_state, self._stop_string_state = self._stop_words.start, self._stop_strings.start

    @property
    def num_known(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompt, and all that may come of it."""
        return self.params.most_tokens(len(self.prompt))

    @property
    def num_tokens(self) -> int:
        return self.num_known + self.in_flight

    @property
    def num_uncached(self) -> int:
        return self.num_tokens - self.num_cached

    @property
    def num_settled(self) -> int:
        """Known tokens whose K and V its pages hold for good once they are computed."""
        return len(self.prompt) if self.keeps_pages else self.num_known

    @property
    def decoding(self) -> bool:
        """True when one token is left to compute, the one sampled last."""
        return self.num_cached > 0 and self.num_uncached == 1

    @property
    def complete(self) -> bool:
        """True when it needs no further step: the tokens asked for are there or in flight."""
        return len(self.output) + self.in_flight >= self.params.request_output_len

    @property
    def cum_log_prob(self) -> float:
        """Sum of the natural log-probabilities of a beam's output."""
        return sum(self.log_probs)

    def copy(self) -> Sequence:
        """The same tokens in a sequence of its own, without pages."""
        twin = copy.copy(self)  # shares its compiled word lists
        twin.output, twin.log_probs, twin.page_keys = self.output[:], self.log_probs[:], self.page_keys[:]
        twin.pages, twin.num_cached, twin.num_shared, twin.in_flight = [], 0, 0, 0
        twin.keeps_pages, twin.search_slot = False, -1
        twin.group = [twin]
        return twin

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of prompt + output at positions `start` to `stop` - 1, as far as they are known."""
        split = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(0, start - split) : max(0, stop - split)]

    def append(self, token: int, log_prob: float, token_bytes: list[bytes]) -> None:
        """Take a sampled token, and set `finish_reason` if it is the last one.

        `token_bytes[id]` is the text of a token in UTF-8; it is only read when there are stop strings.
        """
        params = self.params
        self.output.append(token)
        if params.is_return_log_probs or params.beam_width > 1:
            self.log_probs.append(log_prob)
        reset = token == params.top_p_reset_ids
        self.top_p = (
            params.top_p if reset else max(self.top_p * params.top_p_decay, min(params.top_p_min, params.top_p))
        )
        stops = token in params.end_ids or self._completes_stop_word(token)
        if stops or self._completes_stop_string(token, token_bytes):
            self.finish_reason = "stop"
        elif len(self.output) >= params.request_output_len:
            self.finish_reason = "length"

    def banned_tokens(self) -> list[int]:
        """Ids that may not come next: those that complete a bad word, and before `min_length` the end ids."""
        banned = self._bad_words.banned(lambda count: self.tokens(self.num_tokens - count, self.num_tokens))
        if len(self.output) < self.params.min_length:
            banned += self.params.end_ids
        return banned

    def _completes_stop_word(self, token: int) -> bool:
        if not self.params.stop_words_list:
            return False
        self._stop_word_state, _ = self._stop_words.feed(self._stop_word_state, (token,))
        return self._stop_word_state.complete > 0

    def _completes_stop_string(self, token: int, token_bytes: list[bytes]) -> bool:
        if not self.params.stop_strings:
            return False
        self._stop_string_state, _ = self._stop_strings.feed(self._stop_string_state, token_bytes[token])
        return self._stop_string_state.complete > 0
