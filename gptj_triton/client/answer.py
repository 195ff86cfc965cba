"""The answer to one prompt, or a piece of it. Knows no protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt. Lists have an entry for each returned sequence; what was not asked for is empty (None).

    In a batch, rows of `output_log_probs` are as long as the batch's longest answer. In a stream `text` and
    `num_output_tokens` are what is new, and `finish_reason` has empty strings until the last piece; the rest is so far.
    """

    text: list[str]
    finish_reason: list[str]
    sequence_length: list[int]  # prompt and new tokens
    num_input_tokens: int | None
    num_output_tokens: list[int]
    cum_log_probs: list[float]  # natural logarithms
    output_log_probs: list[list[float]]
