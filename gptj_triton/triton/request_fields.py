"""The fields of a request: one table of them, and the checks made from it.

Reads the rows of a request into `Row` objects or raises `FieldError` in the words of the user's own fields. Knows the
limits that it is handed (context length, vocabulary size), but neither Triton nor the tokenizer.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class FieldError(ValueError):
    """A field that cannot be served; the message names the field, its value and what is allowed."""


@dataclass(frozen=True)
class Field:
    """One input of the ensemble.

    `minimum` and `maximum` are allowed values. `default` is what absence means, None where that is left open. `words`
    marks a list of strings, [B, N]; all others are [B, 1].
    """

    name: str
    dtype: type[np.generic]
    minimum: float | None = None
    maximum: float | None = None
    default: Any = None
    words: bool = False

    @property
    def allowed(self) -> str:
        """The range in words, such as `a number from 0 to 1`."""
        kind = "a finite number" if issubclass(self.dtype, np.floating) else "a whole number"
        if self.minimum is None:
            return kind
        if self.maximum is not None:
            return f"{kind} from {self.minimum:g} to {self.maximum:g}"
        return f"{kind}, {self.minimum:g} or more"

    def allows(self, value: float) -> bool:
        """Whether `value`, a number, lies in the range; NaN and infinities never do."""
        if not math.isfinite(value) or (self.maximum is not None and value > self.maximum):
            return False
        return self.minimum is None or value >= self.minimum


# 64 sequences a row is FasterTransformer's own limit for beams.
FIELDS = (
    Field("text_input", np.object_),
    Field("max_tokens", np.int32, minimum=1),
    Field("min_tokens", np.int32, minimum=0, default=0),
    Field("temperature", np.float32, minimum=0),
    Field("top_k", np.int32, minimum=0),
    Field("top_p", np.float32, minimum=0, maximum=1),
    Field("repetition_penalty", np.float32, minimum=0.001, maximum=1000),
    Field("presence_penalty", np.float32, minimum=-1000, maximum=1000),
    Field("frequency_penalty", np.float32, minimum=-1000, maximum=1000),
    Field("length_penalty", np.float32, minimum=-10, maximum=10),
    Field("seed", np.uint64),
    Field("random_seed", np.uint64),
    Field("beam_width", np.int32, minimum=1, maximum=64, default=1),
    Field("num_return_sequences", np.int32, minimum=1, maximum=64, default=1),
    Field("bad_words", np.object_, words=True, default=()),
    Field("stop_words", np.object_, words=True, default=()),
    Field("end_id", np.int32, minimum=0),
    Field("pad_id", np.int32, minimum=0),
    Field("return_log_probs", np.bool_, default=False),
    Field("exclude_input_in_output", np.bool_, default=True),
    Field("stream", np.bool_, default=False),
    Field("return_num_input_tokens", np.bool_, default=False),
    Field("return_num_output_tokens", np.bool_, default=False),
)
FIELD_NAMES = tuple(field.name for field in FIELDS)

# What an absent max_tokens means where the context has room for it.
DEFAULT_MAX_TOKENS = 16
# Room for any list that a person keeps; without limits one request could hold up everybody's tokenising.
MOST_WORDS = 1024
MOST_WORD_BYTES = 65536

# What Triton itself reads, in its own namespace or over `generate`, where `id` and `timeout` stay among the parameters.
RESERVED_PARAMETERS = frozenset(
    {"id", "timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output"}
)
RESERVED_PREFIX = "triton_"
# Other servers' names for fields of ours, where spelling alone would not lead there.
NAMES_ELSEWHERE = {
    "prompt": "text_input",
    "text": "text_input",
    "inputs": "text_input",
    "stop": "stop_words",
    "n": "num_return_sequences",
    "logprobs": "return_log_probs",
    "echo": "exclude_input_in_output",
}


@dataclass(frozen=True)
class Limits:
    """What the served checkpoint allows.

    `context_length`: tokens of prompt and new text together; `vocab_size`: tokens; `longest_token`: the most bytes that
    one token stands for, None where that cannot be said.
    """

    context_length: int
    vocab_size: int
    longest_token: int | None

    @property
    def longest_prompt(self) -> int:
        """The most tokens of a prompt: at least one token must be new."""
        return self.context_length - 1

    @property
    def most_prompt_bytes(self) -> int | None:
        """The most bytes that a prompt can have, every token being the longest; None where that cannot be said."""
        return None if self.longest_token is None else self.longest_prompt * self.longest_token


@dataclass(frozen=True)
class Row:
    """The checked fields of one row that preprocessing acts on; None where the request leaves the choice open."""

    text_input: str
    max_tokens: int | None
    min_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    beam_width: int
    num_return_sequences: int
    bad_words: tuple[str, ...]
    stop_words: tuple[str, ...]
    end_id: int | None

    @property
    def sampling(self) -> tuple[int, float]:
        """FasterTransformer's (runtime_top_k, runtime_top_p); (0, 0.0) is greedy."""
        if self.temperature == 0:
            return 0, 0.0
        # A temperature alone asks to sample from all tokens, where FasterTransformer's zeros would be greedy.
        if self.temperature is not None and not self.top_k and self.top_p is None:
            return 0, 1.0
        return self.top_k or 0, self.top_p or 0.0


ROW_NAMES = tuple(field.name for field in dataclasses.fields(Row))


def check_parameters(parameters_json: str) -> None:
    """Raise FieldError for a request parameter that is not one of Triton's own, and for a timeout that is none.

    `generate` turns JSON keys that name no input into request parameters: a misspelt field shows here, nowhere else.
    `parameters_json`: the JSON object that the Python backend's request.parameters() returns.
    """
    for name, value in json.loads(parameters_json).items():
        if name == "timeout" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise FieldError(f"timeout is {value!r}; it must be a whole number of microseconds, 0 for no limit")
        if name in RESERVED_PARAMETERS or name.startswith(RESERVED_PREFIX):
            continue
        if name in FIELD_NAMES:
            raise FieldError(f"{name} came as a request parameter; it must be sent as an input tensor")
        raise FieldError(f"unknown field {_shown(name)}{_hint(name)}; the fields are {', '.join(FIELD_NAMES)}")


def read_rows(arrays: Mapping[str, NDArray[Any]], limits: Limits) -> list[Row]:
    """Check every field of a request and return its rows.

    `arrays`: the inputs that are present, by name, each [B, 1] or, for lists of words, [B, N]; strings as bytes.
    Raises FieldError, its message led by `row I:` (from 0) when the request has several rows.
    """
    if "text_input" not in arrays:
        raise FieldError("text_input is missing; it must be a prompt of at least one character")
    count = len(arrays["text_input"])
    rows = []
    for index in range(count):
        try:
            rows.append(_read_row({name: array[index] for name, array in arrays.items()}, limits))
        except FieldError as error:
            raise FieldError(f"{row_prefix(index, count)}{error}") from None
    _require_agreement(rows)
    return rows


def row_prefix(index: int, count: int) -> str:
    """`row INDEX: ` where a request has several rows, else nothing."""
    return f"row {index}: " if count > 1 else ""


def new_token_limit(row: Row, prompt_length: int, limits: Limits) -> int:
    """The most tokens to generate behind a prompt of `prompt_length` tokens; raises FieldError where they do not fit.

    An absent max_tokens asks for no number in particular, so it gives way to the context.
    """
    context, longest = limits.context_length, limits.longest_prompt
    if not 1 <= prompt_length <= longest:
        raise FieldError(
            f"text_input is {prompt_length} tokens long; it must be from 1 to {longest}, because the context holds "
            f"{context} tokens and at least one of them must be new"
        )
    room = context - prompt_length
    if row.max_tokens is None:
        granted = min(max(DEFAULT_MAX_TOKENS, row.min_tokens), room)
    elif row.max_tokens <= room:
        granted = row.max_tokens
    else:
        raise FieldError(
            f"max_tokens is {row.max_tokens}; it must be from 1 to {room}, because text_input is {prompt_length} "
            f"tokens long and the context holds {context} tokens, prompt and new text together"
        )
    if row.min_tokens > granted:
        raise FieldError(f"min_tokens is {row.min_tokens}; it must be from 0 to max_tokens, here {granted}")
    return granted


def _read_row(values: Mapping[str, NDArray[Any]], limits: Limits) -> Row:
    """One row; `values`: [1] for each field that is present, [N] for lists of words."""
    _refuse_bulk(values, limits)
    read: dict[str, Any] = {}
    for field in FIELDS:
        read[field.name] = _checked(field, values[field.name]) if field.name in values else field.default
    for name in ("end_id", "pad_id"):
        if read[name] is not None and read[name] >= limits.vocab_size:
            raise FieldError(
                f"{name} is {read[name]}; it must be a token of the vocabulary, from 0 to {limits.vocab_size - 1}"
            )
    if read["stream"]:
        raise FieldError("stream is true; it must be false, because `ensemble` answers once: use `ensemble_stream`")
    seed, alias = read["seed"], read["random_seed"]
    if None not in (seed, alias) and seed != alias:
        raise FieldError(f"seed is {seed} and random_seed, its other name, is {alias}; they must be equal")
    read["seed"] = alias if seed is None else seed
    return Row(**{name: read[name] for name in ROW_NAMES})


def _refuse_bulk(values: Mapping[str, NDArray[Any]], limits: Limits) -> None:
    """Raise FieldError for texts too long to tokenise: that would hold up everybody for an answer that is known."""
    size, most = len(values["text_input"].item()), limits.most_prompt_bytes
    if most is not None and size > most:
        raise FieldError(
            f"text_input is {size} bytes long; it must be at most {most}, because the context holds "
            f"{limits.context_length} tokens, at least one of them new, and the longest token stands for "
            f"{limits.longest_token} bytes"
        )
    for name in ("bad_words", "stop_words"):
        words = values[name].tolist() if name in values else []
        if len(words) > MOST_WORDS:
            raise FieldError(f"{name} has {len(words)} words; it must have at most {MOST_WORDS}")
        size = sum(map(len, words))
        if size > MOST_WORD_BYTES:
            raise FieldError(f"{name} has {size} bytes in all; it must have at most {MOST_WORD_BYTES}")


def _checked(field: Field, values: NDArray[Any]) -> Any:
    """The Python value of one field of one row."""
    if field.words:
        return tuple(_text(f"{field.name}[{index}]", value) for index, value in enumerate(values.tolist()))
    value = values.item()
    if issubclass(field.dtype, np.object_):
        return _text(field.name, value)
    if issubclass(field.dtype, np.number) and not field.allows(value):
        # Seven digits are all that a 32-bit float carries.
        shown = f"{value:.7g}" if isinstance(value, float) else value
        raise FieldError(f"{field.name} is {shown}; it must be {field.allowed}")
    return value


def _text(name: str, value: bytes) -> str:
    """`value` as text; raises FieldError when it is empty or not UTF-8."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FieldError(
            f"{name} has the byte 0x{value[error.start]:02x} at position {error.start}; it must be valid UTF-8"
        ) from None
    if not text:
        raise FieldError(f"{name} is empty; it must have at least one character")
    return text


def _require_agreement(rows: list[Row]) -> None:
    """Raise FieldError unless all rows ask for equally many sequences: the answer is one rectangular tensor."""
    for name in ("beam_width", "num_return_sequences"):
        for index, row in enumerate(rows):
            value, first = getattr(row, name), getattr(rows[0], name)
            if value != first:
                raise FieldError(
                    f"row {index}: {name} is {value}; it must be {first}, as in row 0, in all rows of a request"
                )


def _hint(name: str) -> str:
    """` (did you mean ...?)`, where a field is near enough in spelling or known by that name elsewhere."""
    nearest = NAMES_ELSEWHERE.get(name.lower())
    if nearest is None:
        near = difflib.get_close_matches(name[:60].lower(), FIELD_NAMES, n=1, cutoff=0.5)
        nearest = near[0] if near else None
    return f" (did you mean {nearest}?)" if nearest else ""


def _shown(name: str) -> str:
    """`name` for a message, quoted and never longer than a line."""
    return repr(name if len(name) <= 60 else name[:57] + "...")
