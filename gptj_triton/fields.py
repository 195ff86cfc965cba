"""The one table of request fields. Knows neither Triton nor numpy.

Everything that lists fields is made from it: the models' configurations (`make configs`), the checks of requests, the
client's options and the table in docs/reference.md.

A field has the name that users of `ensemble` give it. A tensor is an input of the model `fastertransformer`; most
fields have one. Types are named as on Triton's wire: BYTES is a string.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Origin(Enum):
    """Who declares a tensor."""

    NVIDIA = "declared in NVIDIA's configuration of GPT-J"
    UNDECLARED = "known to FasterTransformer's GPT-J, but not declared there"
    OURS = "added by this project"
    STREAMING = "added by this project, to the streaming model alone"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input of the model `fastertransformer`, [rows, *dims]; -1 is any length.

    `made`: preprocessing makes it. Otherwise the ensemble's field is sent to the model as it is.
    """

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    origin: Origin = Origin.NVIDIA
    made: bool = False
    required: bool = False


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a request: one value a row, or a list of them (`many`), whose length limits.py bounds.

    `name` is None where only the tensor exists. `minimum` and `maximum` are allowed values, except that `above_minimum`
    excludes the minimum. `default` is what absence means; `default_words` says it where it is no constant.
    `postprocessing`: that step reads the field, too; preprocessing reads and checks all. `elsewhere`: names that other
    servers give the field.
    """

    name: str | None = None
    dtype: str
    help: str
    many: bool = False
    minimum: float | None = None
    maximum: float | None = None
    above_minimum: bool = False
    default: Any = None
    default_words: str = ""
    tensor: Tensor | None = None
    postprocessing: bool = False
    alias_of: str | None = None
    elsewhere: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What a value is, in words: `a finite number` or `a whole number`."""
        return "a finite number" if self.dtype == "FP32" else "a whole number"

    @property
    def default_in_words(self) -> str:
        if self.default_words:
            return self.default_words
        return "none" if self.many else plain(self.default).lower()

    def allows(self, value: float, most: float = math.inf) -> bool:
        """Whether `value`, a number, is in the range and not above `most`; NaN and infinities never are."""
        if not math.isfinite(value) or value > most or (self.maximum is not None and value > self.maximum):
            return False
        return self.minimum is None or value > self.minimum or (value == self.minimum and not self.above_minimum)

    def range(self, most: float = math.inf) -> str:
        """The range in words, at most `most`: `0 to 1`, `more than 0, at most 1`, `1 or more`; "" for any value."""
        if self.minimum is None:
            return ""
        low, high = plain(self.minimum), plain(min(most, math.inf if self.maximum is None else self.maximum))
        if self.above_minimum:
            return f"more than {low}, at most {high}"
        if high != "inf":
            return f"{low} to {high}"
        return f"{self.kind} >= {low}" if self.dtype == "FP32" else f"{low} or more"


def plain(value: Any) -> str:
    """A number for a message, without the digits that a 32-bit float does not carry."""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


# FasterTransformer's own limit for beams.
MOST_SEQUENCES = 64
# The range of penalties is far beyond any use, and keeps logits finite.

FIELDS = (
    Field(
        name="text_input",
        dtype="BYTES",
        help="the prompt",
        default_words="required",
        tensor=Tensor(name="input_ids", dtype="UINT32", dims=(-1,), made=True, required=True),
        elsewhere=("prompt", "prompts", "text", "input", "inputs", "input_text"),
    ),
    Field(
        dtype="UINT32",
        help="tokens of the prompt; what follows them in input_ids is padding",
        default_words="required",
        tensor=Tensor(name="input_lengths", dtype="UINT32", made=True, required=True),
    ),
    Field(
        dtype="UINT32",
        help="the prompt of a row that has none",
        minimum=0,
        default_words="the model's",
        tensor=Tensor(name="start_id", dtype="UINT32"),
    ),
    Field(
        name="max_tokens",
        dtype="INT32",
        help="most new tokens; prompt and new tokens together must fit in the context",
        minimum=1,
        default=16,
        tensor=Tensor(name="request_output_len", dtype="UINT32", made=True, required=True),
        elsewhere=(
            "max_new_tokens",
            "max_completion_tokens",
            "max_output_tokens",
            "max_tokens_to_sample",
            "max_token_count",
            "max_length",
            "max_len",
            "max_gen_len",
            "num_tokens",
            "n_predict",
            "num_predict",
        ),
    ),
    Field(
        name="min_tokens",
        dtype="INT32",
        help="fewest new tokens, at most max_tokens: no end token is chosen before",
        minimum=0,
        default=0,
        tensor=Tensor(name="min_length", dtype="UINT32", origin=Origin.UNDECLARED, made=True),
        elsewhere=("min_new_tokens", "min_len"),
    ),
    Field(
        name="min_length",
        dtype="INT32",
        help="another name of min_tokens",
        minimum=0,
        default_words="min_tokens",
        alias_of="min_tokens",
    ),
    Field(
        name="temperature",
        dtype="FP32",
        help="below 1 is safer, above 1 is wilder, 0 is greedy; without top_k and top_p it draws from all tokens",
        minimum=0,
        default=1.0,
        tensor=Tensor(name="temperature", dtype="FP32"),
        elsewhere=("temp",),
    ),
    Field(
        name="top_k",
        dtype="INT32",
        help="draw from the k most probable tokens; 0 is no limit",
        minimum=0,
        default=0,
        tensor=Tensor(name="runtime_top_k", dtype="UINT32", made=True),
    ),
    Field(
        name="top_p",
        dtype="FP32",
        help="draw from the most probable tokens that hold this share of the probability; 0 is no limit; with top_k, "
        "of what that kept",
        minimum=0,
        maximum=1,
        default=0.0,
        tensor=Tensor(name="runtime_top_p", dtype="FP32", made=True),
    ),
    Field(
        name="min_p",
        dtype="FP32",
        help="draw only from tokens at least this share as probable as the most probable one; given alone, from all of "
        "these; 0 is no limit",
        minimum=0,
        maximum=1,
        default=0.0,
        tensor=Tensor(name="min_p", dtype="FP32", origin=Origin.OURS),
    ),
    Field(
        name="repetition_penalty",
        dtype="FP32",
        help="above 1 makes tokens of prompt and output less probable: it divides a positive logit, multiplies others",
        minimum=0.001,
        maximum=1000,
        default=1.0,
        tensor=Tensor(name="repetition_penalty", dtype="FP32"),
        elsewhere=("repeat_penalty", "rep_penalty"),
    ),
    Field(
        name="presence_penalty",
        dtype="FP32",
        help="subtracted once from the logit of each token of prompt and output",
        minimum=-1000,
        maximum=1000,
        default=0.0,
        tensor=Tensor(name="presence_penalty", dtype="FP32", origin=Origin.UNDECLARED),
        elsewhere=("pres_penalty",),
    ),
    Field(
        name="frequency_penalty",
        dtype="FP32",
        help="subtracted from a token's logit for each time that the token occurs in prompt and output",
        minimum=-1000,
        maximum=1000,
        default=0.0,
        tensor=Tensor(name="frequency_penalty", dtype="FP32", origin=Origin.OURS),
        elsewhere=("freq_penalty",),
    ),
    Field(
        name="length_penalty",
        dtype="FP32",
        help="beams are ranked by log-probability / length ^ penalty",
        minimum=-10,
        maximum=10,
        default=0.0,
        tensor=Tensor(name="len_penalty", dtype="FP32"),
    ),
    Field(
        name="seed",
        dtype="UINT64",
        help="equal seeds draw equal tokens, whatever else is served (on a GPU up to near-ties)",
        default_words="a new one each time",
        tensor=Tensor(name="random_seed", dtype="UINT64", made=True),
    ),
    Field(name="random_seed", dtype="UINT64", help="another name of seed", default_words="seed", alias_of="seed"),
    Field(
        name="beam_width",
        dtype="INT32",
        help="beams kept in beam search; all are returned, best first",
        minimum=1,
        maximum=MOST_SEQUENCES,
        default=1,
        tensor=Tensor(name="beam_width", dtype="UINT32", made=True),
        elsewhere=("num_beams", "beam_size"),
    ),
    Field(
        dtype="FP32",
        help="beam search: this times its rank is added to each candidate of a beam",
        minimum=-1000,
        maximum=1000,
        default=0.0,
        tensor=Tensor(name="beam_search_diversity_rate", dtype="FP32"),
    ),
    Field(
        name="num_return_sequences",
        dtype="INT32",
        help="independent continuations of the prompt",
        minimum=1,
        maximum=MOST_SEQUENCES,
        default=1,
        tensor=Tensor(name="num_return_sequences", dtype="INT32", origin=Origin.OURS),
        elsewhere=("n", "num_generations", "candidate_count"),
    ),
    Field(
        name="bad_words",
        dtype="BYTES",
        help="words that are not written: the tokens of each as it is, and of each after a space",
        many=True,
        default=(),
        tensor=Tensor(name="bad_words_list", dtype="INT32", dims=(2, -1), made=True),
        elsewhere=("bad_words_ids",),
    ),
    Field(
        name="stop_words",
        dtype="BYTES",
        help="the text ends before the first of them, however tokens merge",
        many=True,
        default=(),
        tensor=Tensor(name="stop_strings", dtype="BYTES", dims=(-1,), origin=Origin.OURS),
        postprocessing=True,
        elsewhere=("stop", "stop_sequences", "stop_tokens"),
    ),
    Field(
        dtype="INT32",
        help="stop words as token ids; all that NVIDIA's library knows",
        many=True,
        default=(),
        tensor=Tensor(name="stop_words_list", dtype="INT32", dims=(2, -1), made=True),
    ),
    Field(
        name="end_id",
        dtype="INT32",
        help="the token that ends the text, it alone",
        minimum=0,
        default_words="all those of the model",
        tensor=Tensor(name="end_id", dtype="UINT32", made=True),
        elsewhere=("eos_token_id", "eos_id", "stop_token_ids"),
    ),
    Field(
        dtype="INT32",
        help="the tokens that end the text, where they are not end_id alone; padded with -1",
        many=True,
        default_words="end_id",
        tensor=Tensor(name="end_ids", dtype="INT32", dims=(-1,), origin=Origin.OURS, made=True),
    ),
    Field(
        name="pad_id",
        dtype="INT32",
        help="checked, and not needed",
        minimum=0,
        default_words="none",
        elsewhere=("pad_token_id",),
    ),
    Field(
        dtype="FP32",
        help="factual nucleus sampling: top-p is multiplied by this after each token",
        minimum=0,
        maximum=1,
        above_minimum=True,
        default=1.0,
        tensor=Tensor(name="top_p_decay", dtype="FP32"),
    ),
    Field(
        dtype="FP32",
        help="factual nucleus sampling: top-p does not fall below this",
        minimum=0,
        maximum=1,
        above_minimum=True,
        default=1e-6,
        tensor=Tensor(name="top_p_min", dtype="FP32"),
    ),
    Field(
        dtype="UINT32",
        help="factual nucleus sampling: the token after which top-p starts again",
        default=-1,
        default_words="none",
        tensor=Tensor(name="top_p_reset_ids", dtype="UINT32"),
    ),
    Field(
        dtype="UINT32",
        help="a prompt task; refused, the model has none",
        default_words="none",
        tensor=Tensor(name="prompt_learning_task_name_ids", dtype="UINT32"),
    ),
    Field(
        name="return_log_probs",
        dtype="BOOL",
        help="fill cum_log_probs and output_log_probs, natural logarithms",
        default=False,
        tensor=Tensor(name="is_return_log_probs", dtype="BOOL"),
        elsewhere=("logprobs", "top_logprobs"),
    ),
    Field(
        name="exclude_input_in_output",
        dtype="BOOL",
        help="return the new text alone, without the prompt before it",
        default=True,
        tensor=Tensor(name="exclude_input_in_output", dtype="BOOL", origin=Origin.STREAMING),
        postprocessing=True,
        elsewhere=("echo", "return_full_text"),
    ),
    Field(
        name="stream",
        dtype="BOOL",
        help="ensemble_stream answers in pieces unless this is false; ensemble answers once, so there it must be "
        "false, unless the server runs with --streaming-ensemble",
        default_words="true in ensemble_stream, else false",
        tensor=Tensor(name="stream", dtype="BOOL", origin=Origin.STREAMING),
        elsewhere=("streaming",),
    ),
    Field(
        name="return_num_input_tokens",
        dtype="BOOL",
        help="fill num_input_tokens, the number of tokens of the prompt",
        default=False,
        tensor=Tensor(name="return_num_input_tokens", dtype="BOOL", origin=Origin.STREAMING),
        postprocessing=True,
    ),
    Field(
        name="return_num_output_tokens",
        dtype="BOOL",
        help="fill num_output_tokens, the number of new tokens",
        default=False,
        tensor=Tensor(name="return_num_output_tokens", dtype="BOOL", origin=Origin.STREAMING),
        postprocessing=True,
    ),
)

BY_NAME = {field.name: field for field in FIELDS if field.name is not None}
BY_TENSOR = {field.tensor.name: field for field in FIELDS if field.tensor is not None}
