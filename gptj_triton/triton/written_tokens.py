"""The tensors of postprocessing to sequences whose text is wanted, checked. Of Triton only numpy.

B rows a request, n sequences a row. Anybody may ask the step directly, so tensors may contradict each other.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptj_triton.errors import InvalidRequestError
from gptj_triton.limits import DEFAULTS, RequestLimits
from gptj_triton.triton.request_size import (
    Tensors,
    check_sequences,
    check_size,
    check_strings,
    check_word_bytes,
    string_bytes,
)
from gptj_triton.triton.tensors import read_each_row, refuse_no_rows, require

REQUIRED = ("output_ids", "sequence_length", "input_lengths", "end_id")
# Tensors of one value a sequence, [B, n]; all but the first are optional.
PER_SEQUENCE = ("sequence_length", "previous_length", "finish_reason", "cancel_handle")
PADDING = ("end_ids", -1)
LONGEST_REASON = 64  # bytes


class WrittenTokens(NamedTuple):
    """A sequence, in the order of the arguments of `Detokenizer.piece`, which says what they mean."""

    ids: NDArray[Any]
    prompt_length: int
    previous_length: int
    end_ids: list[int]
    stop_words: list[bytes]
    reason: str
    with_prompt: bool


def read_sequences(tensors: Tensors, vocab_size: int | None, limits: RequestLimits = DEFAULTS) -> list[WrittenTokens]:
    """The sequences of all rows, those of the first row first.

    Raises InvalidRequestError naming the tensor, its value, what the others allow and, in a request of several rows,
    the row.
    """
    require(tensors, REQUIRED)
    refuse_no_rows(tensors, "output_ids", 3)
    check_size(tensors, limits)
    rows, sequences, width = tensors["output_ids"].shape
    if not sequences:
        raise InvalidRequestError("output_ids", "0 sequences a row", "1 or more")
    for name in PER_SEQUENCE:
        if name in tensors and tensors[name].shape[1] != sequences:
            allowed = f"{sequences}, one for each sequence of output_ids"
            raise InvalidRequestError(name, f"{tensors[name].shape[1]} values a row", allowed)
    check_sequences(rows * sequences, int(np.minimum(tensors["sequence_length"], width).sum(dtype=np.uint64)), limits)
    if "stop_words" in tensors:
        check_word_bytes((sequences * string_bytes(words) for words in tensors["stop_words"].tolist()), limits)

    def read(index: int) -> list[WrittenTokens]:
        return _read_row({name: tensor[index] for name, tensor in tensors.items()}, vocab_size, limits)

    return list(itertools.chain(*read_each_row(rows, read)))


def _read_row(tensors: Tensors, vocab_size: int | None, limits: RequestLimits) -> list[WrittenTokens]:
    """The sequences of one row; `tensors` without their first dimension."""
    ids, lengths = tensors["output_ids"], tensors["sequence_length"].tolist()
    prompt_length, end_id = tensors["input_lengths"].item(), tensors["end_id"].item()
    if max(lengths) > ids.shape[1]:
        allowed = f"0 to {ids.shape[1]}, the width of output_ids"
        raise InvalidRequestError("sequence_length", max(lengths), allowed)
    if prompt_length > min(lengths):
        allowed = f"0 to {min(lengths)}, the shortest sequence_length"
        raise InvalidRequestError("input_lengths", prompt_length, allowed)
    limits.check("max_words", len(tensors.get("end_ids", ())), "number of end_ids")
    end_name, end_ids = ("end_ids", tensors["end_ids"].tolist()) if "end_ids" in tensors else ("end_id", [end_id])
    if vocab_size is not None:
        largest = [int(sequence[:length].max(initial=0)) for sequence, length in zip(ids, lengths, strict=True)]
        for name, tokens in (("output_ids", largest), (end_name, end_ids)):
            for token in tokens:
                if not 0 <= token < vocab_size and (name, token) != PADDING:
                    raise InvalidRequestError(name, token, f"token ids from 0 to {vocab_size - 1}")
    previous = tensors["previous_length"].tolist() if "previous_length" in tensors else [prompt_length] * len(lengths)
    for before, length in zip(previous, lengths, strict=True):
        if not prompt_length <= before <= length:
            allowed = f"{prompt_length} to {length}, from input_lengths to sequence_length"
            raise InvalidRequestError("previous_length", before, allowed)
    reasons = tensors["finish_reason"].tolist() if "finish_reason" in tensors else [b"length"] * len(lengths)
    stop_words = tensors["stop_words"].tolist() if "stop_words" in tensors else []
    if stop_words:
        check_strings("stop_words", tensors["stop_words"], limits)
    with_prompt = "exclude_input_in_output" in tensors and not tensors["exclude_input_in_output"].item()
    return [
        WrittenTokens(sequence[:length], prompt_length, before, end_ids, stop_words, _text(reason), with_prompt)
        for sequence, length, before, reason in zip(ids, lengths, previous, reasons, strict=True)
    ]


def _text(reason: bytes) -> str:
    """A finish reason as text."""
    if len(reason) > LONGEST_REASON:
        raise InvalidRequestError("finish_reason", f"of {len(reason)} bytes", f"0 to {LONGEST_REASON} bytes")
    try:
        return reason.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("finish_reason", repr(reason), "UTF-8") from None
