"""The fields of a request to the ensemble: read from its tensors, and checked against the table of fields.

Reads the rows of a request into `RowFields` objects or raises `FieldError` in the words of the user's own fields. Knows
the limits that it is handed (context length, vocabulary size), but neither Triton nor the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from gptj_triton.errors import InvalidRequestError
from gptj_triton.fields import BY_NAME, Field, plain
from gptj_triton.limits import DEFAULTS, RequestLimits
from gptj_triton.triton.request_size import check_sequences, check_size, check_strings, check_word_bytes, string_bytes

MOST_NAMES = 8  # in a message
ALIASES = {name: field.alias_of for name, field in BY_NAME.items() if field.alias_of is not None}


class FieldError(ValueError):
    """A field that cannot be served; the message names the field, its value and what is allowed."""


REFUSALS = (FieldError, InvalidRequestError)


@dataclass(frozen=True)
class PromptLimits:
    """What the served checkpoint allows, and what is allowed of a request, `most`.

    `context_length`: tokens of prompt and new text together; `vocab_size`: tokens; `longest_token`: the most bytes that
    one token stands for, None where that cannot be said.
    """

    context_length: int
    vocab_size: int
    longest_token: int | None
    most: RequestLimits = DEFAULTS

    @property
    def longest_prompt(self) -> int:
        """The most tokens of a prompt: at least one token must be new."""
        return self.context_length - 1

    @property
    def most_prompt_bytes(self) -> int | None:
        """The most bytes that a prompt can have, every token being the longest; None where that cannot be said."""
        return None if self.longest_token is None else self.longest_prompt * self.longest_token


@dataclass(frozen=True)
class RowFields:
    """The checked fields of one row that preprocessing acts on; None where the request leaves the choice open."""

    text_input: str
    max_tokens: int | None
    min_tokens: int
    min_tokens_name: str  # the name under which it came
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
    def num_sequences(self) -> int:
        """All that are computed for the row."""
        return max(self.num_return_sequences, self.beam_width)

    @property
    def word_bytes(self) -> int:
        """What its stop and bad words take as strings, for each of its sequences."""
        words = (word.encode() for word in (*self.stop_words, *self.bad_words))
        return self.num_return_sequences * string_bytes(words)

    @property
    def sampling(self) -> tuple[int, float]:
        """FasterTransformer's (runtime_top_k, runtime_top_p); (0, 0.0) is greedy."""
        if self.temperature == 0:
            return 0, 0.0
        # A temperature alone asks to sample from all tokens, where FasterTransformer's zeros would be greedy.
        if self.temperature is not None and not self.top_k and self.top_p is None:
            return 0, 1.0
        return self.top_k or 0, self.top_p or 0.0


def read_fields(
    arrays: Mapping[str, NDArray[Any]], limits: PromptLimits, unknown: Sequence[str] = (), may_stream: bool = False
) -> list[RowFields]:
    """Check every field of a request and return its rows.

    `arrays`: the inputs that are present, by name, each [B, 1] or, for lists of words, [B, N]; strings as bytes.
    `unknown`: names of parameters that are no fields; one of them may be what should have been the prompt. `stream`
    may be true only if `may_stream`. Raises FieldError, its message led by `row I:` (from 0) when the request has
    several rows.
    """
    if "text_input" not in arrays:
        kind = "unknown field" if len(unknown) == 1 else "unknown fields"
        also = f" ({kind} {', '.join(unknown[:MOST_NAMES])})" if unknown else ""
        raise FieldError(f"text_input is missing; it must be a prompt of at least one character{also}")
    check_size(arrays, limits.most)
    count = _count_rows(arrays)
    size = sum(map(len, arrays["text_input"].ravel().tolist()))
    limits.most.check("max_request_text_bytes", size, "number of bytes of text_input, all rows together,")
    rows = []
    for index in range(count):
        try:
            rows.append(_read_row({name: array[index] for name, array in arrays.items()}, limits, may_stream))
        except REFUSALS as error:
            raise FieldError(f"{row_prefix(index, count)}{error}") from None
    _require_agreement(rows)
    # Before the prompts are tokenised: each has a token or more. What is beyond the context is refused in other words.
    least = sum(row.num_sequences * min(1 + (row.max_tokens or 1), limits.context_length) for row in rows)
    check_sequences(sum(row.num_sequences for row in rows), least, limits.most)
    check_word_bytes((row.word_bytes for row in rows), limits.most)
    return rows


def _count_rows(arrays: Mapping[str, NDArray[Any]]) -> int:
    """The rows of a request. Triton counts those of an ensemble's, but not those of a request to this step alone."""
    count = len(arrays["text_input"])
    if not count:
        raise FieldError("text_input has no rows; it must have one or more")
    for name, array in arrays.items():
        if len(array) != count:
            raise FieldError(f"{name} has {len(array)} rows; it must have {count}, as text_input has")
    return count


def row_prefix(index: int, count: int) -> str:
    """`row INDEX: ` where a request has several rows, else nothing."""
    return f"row {index}: " if count > 1 else ""


def check_tokens(prompt: Sequence[int], limits: PromptLimits) -> None:
    """Raise FieldError for a prompt with a token that the tokenizer has and the model lacks."""
    largest = max(prompt, default=0)
    if largest >= limits.vocab_size:
        raise FieldError(
            f"text_input has the token {largest}; it must have only tokens of the model's vocabulary, from 0 to "
            f"{limits.vocab_size - 1}: the tokenizer has more"
        )


def new_token_limit(row: RowFields, prompt_length: int, limits: PromptLimits) -> int:
    """The most tokens to generate behind a prompt of `prompt_length` tokens; raises FieldError where they do not fit.

    An absent max_tokens asks for no number in particular, so it gives way to the context.
    """
    context, longest = limits.context_length, limits.longest_prompt
    if not 1 <= prompt_length <= longest:
        raise FieldError(
            f"text_input is {prompt_length} tokens long; it must be from 1 to {longest}, because the context holds "
            f"{context} tokens and at least one of them must be new"
        )
    limits.most.check("max_prompt_tokens", prompt_length, "number of tokens of text_input")
    room = context - prompt_length
    if row.max_tokens is None:
        default = min(BY_NAME["max_tokens"].default, limits.most.max_new_tokens or context)
        max_tokens: int = min(max(default, row.min_tokens), room)
    elif row.max_tokens <= room:
        max_tokens = row.max_tokens
    else:
        raise FieldError(
            f"max_tokens is {row.max_tokens}; it must be from 1 to {room}, because text_input is {prompt_length} "
            f"tokens long and the context holds {context} tokens, prompt and new text together"
        )
    if row.min_tokens > max_tokens:
        raise FieldError(
            f"{row.min_tokens_name} is {row.min_tokens}; it must be from 0 to max_tokens, here {max_tokens}"
        )
    limits.most.check("max_new_tokens", max_tokens, "max_tokens")
    return max_tokens


def _read_row(values: Mapping[str, NDArray[Any]], limits: PromptLimits, may_stream: bool) -> RowFields:
    """One row; `values`: [1] for each field that is present, [N] for lists of words."""
    _refuse_bulk(values, limits)
    given = {name: _checked(field, values[name]) for name, field in BY_NAME.items() if name in values}
    for name in ("end_id", "pad_id"):
        if name in given and given[name] >= limits.vocab_size:
            raise FieldError(
                f"{name} is {given[name]}; it must be a token of the vocabulary, from 0 to {limits.vocab_size - 1}"
            )
    if given.get("stream") and not may_stream:
        raise FieldError(
            "stream is true; it must be false, because `ensemble` answers once: use `ensemble_stream`, or "
            "have the server started with --streaming-ensemble"
        )
    min_tokens_name = "min_length" if "min_length" in given and "min_tokens" not in given else "min_tokens"
    _resolve_aliases(given)

    def value(name: str) -> Any:
        return given.get(name, BY_NAME[name].default)

    return RowFields(
        text_input=given["text_input"],
        max_tokens=given.get("max_tokens"),
        min_tokens=value("min_tokens"),
        min_tokens_name=min_tokens_name,
        temperature=given.get("temperature"),
        top_k=given.get("top_k"),
        top_p=given.get("top_p"),
        seed=given.get("seed"),
        beam_width=value("beam_width"),
        num_return_sequences=value("num_return_sequences"),
        bad_words=value("bad_words"),
        stop_words=value("stop_words"),
        end_id=given.get("end_id"),
    )


def _resolve_aliases(given: dict[str, Any]) -> None:
    """Give each field the value that came under another name of it; FieldError where two names disagree."""
    for alias, name in ALIASES.items():
        if alias in given and given.setdefault(name, given[alias]) != given[alias]:
            raise FieldError(
                f"{name} is {given[name]} and {alias}, its other name, is {given[alias]}; they must be equal"
            )


def _refuse_bulk(values: Mapping[str, NDArray[Any]], limits: PromptLimits) -> None:
    """Raise FieldError for texts too long to tokenise: that would hold up everybody for an answer that is known."""
    size, most = len(values["text_input"].item()), limits.most_prompt_bytes
    if most is not None and size > most:
        raise FieldError(
            f"text_input is {size} bytes long; it must be at most {most}, because the context holds "
            f"{limits.context_length} tokens, at least one of them new, and the longest token stands for "
            f"{limits.longest_token} bytes"
        )
    for name in (name for name, field in BY_NAME.items() if field.many and name in values):
        check_strings(name, values[name], limits.most)


def _checked(field: Field, values: NDArray[Any]) -> Any:
    """The Python value of one field of one row. Empty words mean nothing: they fill a row up to others' length."""
    if field.many:
        return tuple(_text(f"{field.name}[{index}]", word) for index, word in enumerate(values.tolist()) if word)
    value = values.item()
    if field.dtype == "BYTES":
        return _text(str(field.name), value)
    if field.dtype != "BOOL" and not field.allows(value):
        raise FieldError(f"{field.name} is {plain(value)}; it must be {_allowed(field)}")
    return value


def _allowed(field: Field) -> str:
    """The range of a number, such as `a finite number from 0 to 1`."""
    if field.minimum is None:
        return field.kind
    if field.maximum is None:
        return f"{field.kind}, {plain(field.minimum)} or more"
    return f"{field.kind}{', ' if field.above_minimum else ' from '}{field.range()}"


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


def _require_agreement(rows: list[RowFields]) -> None:
    """Raise FieldError unless all rows ask for equally many sequences: the answer is one rectangular tensor."""
    for name in ("beam_width", "num_return_sequences"):
        for index, row in enumerate(rows):
            value, first = getattr(row, name), getattr(rows[0], name)
            if value != first:
                raise FieldError(
                    f"row {index}: {name} is {value}; it must be {first}, as in row 0, in all rows of a request"
                )
