"""FasterTransformer's tensors to the engine's requests, checked. Knows what the model allows; of Triton only numpy.

B rows a request. A tensor of one value a row has shape [B] or [B, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from gptj_triton.engine.sampling_params import Limits, SamplingParams
from gptj_triton.errors import InvalidRequestError
from gptj_triton.fields import BY_TENSOR, plain
from gptj_triton.limits import DEFAULTS, RequestLimits
from gptj_triton.process.messages import Welcome
from gptj_triton.triton.request_size import (
    Tensors,
    check_ids,
    check_output_size,
    check_sequences,
    check_size,
    check_strings,
    check_word_bytes,
    id_bytes,
    string_bytes,
    total_id_bytes,
)

Read = TypeVar("Read")
Words = tuple[tuple[int, ...], ...]

# Tensors of one value a row that are parameters of the engine, by the same name.
SCALARS = [name for name, field in BY_TENSOR.items() if name in SamplingParams.__struct_fields__ and not field.many]
ID_LISTS = ("bad_words_list", "stop_words_list")
REQUIRED = [name for name, field in BY_TENSOR.items() if field.tensor is not None and field.tensor.required]
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Row:
    """One prompt and the parameters of each request to the engine that continues it: one, unless several are drawn."""

    prompt: list[int]
    sequences: list[SamplingParams]

    @property
    def beam_width(self) -> int:
        return self.sequences[0].beam_width

    @property
    def num_return_sequences(self) -> int:
        return len(self.sequences)

    def num_sequences(self) -> int:
        """All that are computed for it: those drawn, or its beams."""
        return self.num_return_sequences * self.beam_width

    def num_tokens(self) -> int:
        """Prompt and new tokens of all its sequences."""
        return self.num_sequences() * (len(self.prompt) + self.sequences[0].request_output_len)

    def word_bytes(self) -> int:
        """What its stop and bad words take, for each of its requests to the engine."""
        params = self.sequences[0]
        ids = id_bytes(params.bad_words_list) + id_bytes(params.stop_words_list)
        return self.num_return_sequences * (ids + string_bytes(params.stop_strings))


def refuse_no_rows(tensors: Tensors, name: str, dimensions: int) -> None:
    """Raise InvalidRequestError where the tensor `name` has fewer dimensions than that, in a model that batches.

    Triton 2.51 takes the first dimension from the tensors of a request of 0 rows, and gives them bytes that were not
    sent.
    """
    if name in tensors and tensors[name].ndim < dimensions:
        raise InvalidRequestError(name, "of 0 rows", "1 or more")


def lacks_batch_dimension(tensors: Tensors) -> bool:
    """Whether `input_ids` is [L]: a request of one row, to a model whose max_batch_size is 0.

    Such a model's tensors have the shapes that its config.pbtxt says, so it can also have `input_ids` [B, L]. Raises
    InvalidRequestError where it is neither.
    """
    if "input_ids" not in tensors:
        return False  # read_rows refuses it
    dimensions = tensors["input_ids"].ndim
    if dimensions not in (1, 2):
        allowed = "[B, L], or [L] without a batch dimension"
        raise InvalidRequestError("input_ids", f"of {dimensions} dimensions", allowed)
    return dimensions == 1


def read_rows(tensors: Tensors, model: Welcome, limits: RequestLimits = DEFAULTS) -> list[Row]:
    """The rows of one request, checked. `model` has the ids that absent fields mean, and what the model allows.

    Raises InvalidRequestError naming the tensor, the value, what is allowed and, in a request of several rows, the row.
    """
    require(tensors, REQUIRED)
    check_size(tensors, limits)
    for name, tensor in tensors.items():
        if len(tensor) != len(tensors["input_ids"]):  # Triton sees to that unless max_batch_size is 0
            raise InvalidRequestError(name, f"of {len(tensor)} rows", f"{len(tensors['input_ids'])}, as input_ids has")
    small = limits.max_request_word_bytes // len(ID_LISTS)
    check_word_bytes((total_id_bytes(tensors[name], small) for name in ID_LISTS if _is_id_list(tensors, name)), limits)
    rows = read_each_row(len(tensors["input_ids"]), lambda index: _read_row(tensors, index, model, limits))
    check_sequences(sum(map(Row.num_sequences, rows)), sum(map(Row.num_tokens, rows)), limits)
    check_word_bytes(map(Row.word_bytes, rows), limits)
    check_output_size(
        sum(map(Row.num_sequences, rows)),
        tensors["input_ids"].shape[1] + max(row.sequences[0].request_output_len for row in rows),
        limits,
    )
    for index, row in enumerate(rows):
        for field in ("beam_width", "num_return_sequences"):
            value, first = getattr(row, field), getattr(rows[0], field)
            if value != first:
                raise InvalidRequestError(field, value, f"{first}, as in row 0").in_row(index)
    return rows


def read_each_row(count: int, read: Callable[[int], Read]) -> list[Read]:
    """What `read` makes of each row; its InvalidRequestError names the row where there are several."""
    found = []
    for index in range(count):
        try:
            found.append(read(index))
        except InvalidRequestError as error:
            raise error if count == 1 else error.in_row(index) from None
    return found


def require(tensors: Tensors, names: Sequence[str]) -> None:
    """Raise InvalidRequestError for the first of `names` that is missing: Triton itself only counts the tensors."""
    for name in names:
        if name not in tensors:
            raise InvalidRequestError(name, "missing", f"a request that has {', '.join(names)}")


def read_stream(tensors: Tensors, rows: list[Row]) -> bool:
    """Whether a request to the streaming model is to be streamed, which it is unless its `stream` is false.

    Raises InvalidRequestError where rows differ in it, and for beams.
    """
    flags = tensors["stream"].reshape(-1).tolist() if "stream" in tensors else [True]
    if len(set(flags)) > 1:
        row = flags.index(not flags[0])
        raise InvalidRequestError("stream", flags[row], f"{flags[0]}, as in row 0").in_row(row)
    if flags[0] and rows[0].beam_width > 1:
        allowed = "1 in a stream: beams are not streamed; with stream false they are returned at the end"
        raise InvalidRequestError("beam_width", rows[0].beam_width, allowed)
    return bool(flags[0])


def read_timeout(microseconds: int, parameters: Mapping[str, Any]) -> float:
    """How long a request may take in seconds, 0 for as long as it takes.

    `microseconds` is Triton's own timeout, 0 where there is none; `generate` leaves it in `parameters`.
    Raises InvalidRequestError for what is no whole number of microseconds.
    """
    value = microseconds or parameters.get("timeout", 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequestError("timeout", repr(value), "a whole number of microseconds, 0 for no limit")
    return value / 1e6


def _read_row(tensors: Tensors, index: int, model: Welcome, limits: RequestLimits) -> Row:
    def scalar(name: str, default: int) -> Any:
        if name not in tensors:
            return default
        values = tensors[name][index].reshape(-1)
        if len(values) != 1:
            raise InvalidRequestError(name, f"{len(values)} values", "one value a row")
        return values[0].item()

    if "prompt_learning_task_name_ids" in tensors:
        task = scalar("prompt_learning_task_name_ids", 0)
        raise InvalidRequestError("prompt_learning_task_name_ids", task, "none: the checkpoint has no prompt tasks")
    padded = tensors["input_ids"][index]
    length = scalar("input_lengths", 0)
    if not 0 <= length <= len(padded):  # below 0 where a config.pbtxt declares INT32
        raise InvalidRequestError("input_lengths", length, f"0 to {len(padded)}, the width of input_ids")
    start = scalar("start_id", model.start_id)
    _check_range("start_id", start, model.limits.vocab_size - 1)
    limits.check("max_prompt_tokens", length, "number of tokens of the prompt")
    prompt = padded[:length].tolist() or [start]
    values: dict[str, Any] = {name: scalar(name, 0) for name in SCALARS if name in tensors}
    if "end_ids" in tensors:  # end_id counts for nothing then
        limits.check("max_words", len(tensors["end_ids"][index]), "number of end_ids")
        end_ids = tuple(dict.fromkeys(token for token in tensors["end_ids"][index].tolist() if token != -1))
    else:
        end_ids = (scalar("end_id", 0),) if "end_id" in tensors else model.end_ids
    if "random_seed" in values:
        values["random_seed"] &= _MASK  # it may be below 0 where a config.pbtxt declares INT32, as older versions did
    if "stop_strings" in tensors:
        check_strings("stop_strings", tensors["stop_strings"][index], limits)
        values["stop_strings"] = tuple(filter(None, tensors["stop_strings"][index].tolist()))
    values |= {name: _read_words(tensors, name, index, limits) for name in ID_LISTS}
    params = SamplingParams(end_ids=end_ids, **values)
    limits.check("max_new_tokens", params.request_output_len, "number of new tokens, request_output_len,")
    _check(prompt, params, model.limits, "end_ids" if "end_ids" in tensors else "end_id")
    copies = scalar("num_return_sequences", 1)
    _check_range("num_return_sequences", copies)
    if copies > 1 and params.beam_width > 1:
        raise InvalidRequestError("num_return_sequences", copies, "1 with beam search, which returns all its beams")
    seeds = [derived_seed(params.random_seed, number) for number in range(1, copies)]
    return Row(prompt, [params, *(msgspec.structs.replace(params, random_seed=seed) for seed in seeds)])


def _check(prompt: list[int], params: SamplingParams, limits: Limits, end_name: str) -> None:
    """Raise InvalidRequestError for the first tensor that is out of its range, or beyond what the model allows.

    `end_name`: the tensor that the end ids came from.
    """
    context, last = limits.context_length, limits.vocab_size - 1
    vocabulary = f"token ids from 0 to {last}"
    if not 1 <= len(prompt) < context:
        raise InvalidRequestError("input_lengths", len(prompt), f"1 to {context - 1}, one less than the context")
    for name, words in (
        ("input_ids", (prompt,)),
        ("bad_words_list", params.bad_words_list),
        ("stop_words_list", params.stop_words_list),
        (end_name, (params.end_ids,) if params.end_ids else ()),
    ):
        for token in (end for word in words for end in (min(word), max(word))):
            if not 0 <= token <= last:
                raise InvalidRequestError(name, token, vocabulary)
    room = context - len(prompt)
    _check_range("request_output_len", params.request_output_len, room, f", what the prompt leaves of {context}")
    most = {"min_length": params.request_output_len, "beam_width": limits.max_sequences}
    for name in SCALARS:
        _check_range(name, getattr(params, name), most.get(name, math.inf))
    pages = params.most_pages(len(prompt), limits.page_size)
    if pages > limits.num_pages:
        allowed = f"fewer beams or tokens: they need {pages} pages of the KV cache, which has {limits.num_pages}"
        raise InvalidRequestError("beam_width", params.beam_width, allowed)
    if params.stop_strings and not limits.stop_strings:
        raise InvalidRequestError("stop_strings", "given", "none: the checkpoint has no byte-level tokenizer.json")


def _check_range(name: str, value: float, most: float = math.inf, reason: str = "") -> None:
    """Raise InvalidRequestError for a value that the table does not allow, or above `most`, for the `reason` given."""
    field = BY_TENSOR[name]
    if not field.allows(value, most):
        raise InvalidRequestError(name, plain(value), f"{field.range(most)}{reason}")


def _is_id_list(tensors: Tensors, name: str) -> bool:
    """Whether there are words of that name. Raises InvalidRequestError where they have another shape than [B, 2, W]."""
    if name in tensors and (tensors[name].ndim != 3 or tensors[name].shape[1] != 2):
        raise InvalidRequestError(name, f"of shape {list(tensors[name].shape)}", "[B, 2, W]")
    return name in tensors


def _read_words(tensors: Tensors, name: str, index: int, limits: RequestLimits) -> Words:
    """Words of a [2, W] list: token ids end to end, then the cumulative end of each word, padded with -1. Empty words
    are skipped.
    """
    if name not in tensors:
        return ()
    check_ids(name, tensors[name][index], limits)
    tokens, ends = tensors[name][index].tolist()
    words: list[tuple[int, ...]] = []
    start = 0
    for end in ends:
        if end == -1:
            break
        if not start <= end <= len(tokens):
            raise InvalidRequestError(name, f"an end offset of {end}", f"{start} to {len(tokens)}, then -1")
        words.append(tuple(tokens[start:end]))
        start = end
    return tuple(word for word in words if word)


def derived_seed(seed: int, number: int) -> int:
    """The seed of the `number`-th sequence that a row returns; the first one's is the row's own."""
    return (seed + number * 0x9E3779B97F4A7C15) & _MASK
