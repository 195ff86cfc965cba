"""FasterTransformer's tensors ↔ the engine's requests and answers. Knows the contract's names and shapes; of Triton
only numpy.

B rows a request, L the padded length of its prompts, n sequences a row. A scalar field has shape [B] or [B, 1].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import InvalidRequestError
from gptj_triton.process.messages import Finished, Result, Welcome

Tensors = Mapping[str, NDArray[Any]]
Words = tuple[tuple[int, ...], ...]

SCALARS = (  # tensors that are fields of SamplingParams by the same name, where present
    "end_id",
    "min_length",
    "runtime_top_k",
    "runtime_top_p",
    "temperature",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "random_seed",
    "beam_width",
    "len_penalty",
    "beam_search_diversity_rate",
    "is_return_log_probs",
    "top_p_decay",
    "top_p_min",
)
MAX_SEQUENCES_A_ROW = 64
# What postprocessing needs of a streamed request, which can reach it through this model alone.
PASSED_THROUGH = (
    "stop_strings",
    "exclude_input_in_output",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Row:
    """One prompt and the parameters of each request to the engine that continues it: one, unless several are drawn."""

    prompt: list[int]
    requests: list[SamplingParams]

    @property
    def beam_width(self) -> int:
        return self.requests[0].beam_width

    @property
    def num_return_sequences(self) -> int:
        return len(self.requests)


def read_rows(tensors: Tensors, model: Welcome) -> list[Row]:
    """The rows of one request, checked. `model` tells what absent fields stand for and what the model allows.

    Raises InvalidRequestError naming the tensor, the value, what is allowed and, in a request of several rows, the row.
    """
    rows = []
    for index in range(len(tensors["input_ids"])):
        try:
            rows.append(_read_row(tensors, index, model))
        except InvalidRequestError as error:
            raise error if len(tensors["input_ids"]) == 1 else error.in_row(index) from None
    for index, row in enumerate(rows):
        for field in ("beam_width", "num_return_sequences"):
            value, first = getattr(row, field), getattr(rows[0], field)
            if value != first:
                raise InvalidRequestError(field, value, f"{first}, as in row 0").in_row(index)
    return rows


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


def read_timeout(microseconds: int, parameters: str) -> float:
    """How long a request may take in seconds, 0 for as long as it takes.

    `microseconds` is Triton's own timeout, 0 where there is none; `generate` leaves it in `parameters`, a JSON object.
    Raises InvalidRequestError for what is no whole number of microseconds.
    """
    value = microseconds or json.loads(parameters or "{}").get("timeout", 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequestError("timeout", repr(value), "a whole number of microseconds, 0 for no limit")
    return value / 1e6


def _read_row(tensors: Tensors, index: int, model: Welcome) -> Row:
    def scalar(name: str, default: int | float) -> Any:
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
    if length > len(padded):
        raise InvalidRequestError("input_lengths", length, f"0 to {len(padded)}, the width of input_ids")
    prompt = padded[:length].tolist() or [scalar("start_id", model.start_id)]

    values: dict[str, Any] = {"end_id": model.end_id}
    values |= {name: scalar(name, 0) for name in SCALARS if name in tensors}
    params = SamplingParams(
        request_output_len=scalar("request_output_len", 0),
        top_p_reset_id=scalar("top_p_reset_ids", -1),
        bad_words=_read_words(tensors, "bad_words_list", index),
        stop_words=_read_words(tensors, "stop_words_list", index),
        stop_strings=tuple(tensors["stop_strings"][index].tolist()) if "stop_strings" in tensors else (),
        **values,
    )
    params.check(prompt, model.limits)
    copies = scalar("num_return_sequences", 1)
    if not 1 <= copies <= MAX_SEQUENCES_A_ROW:
        raise InvalidRequestError("num_return_sequences", copies, f"1 to {MAX_SEQUENCES_A_ROW}")
    if copies > 1 and params.beam_width > 1:
        raise InvalidRequestError("num_return_sequences", copies, "1 with beam search, which returns all its beams")
    seeds = [derived_seed(params.random_seed, number) for number in range(1, copies)]
    return Row(prompt, [params, *(msgspec.structs.replace(params, random_seed=seed) for seed in seeds)])


def _read_words(tensors: Tensors, name: str, index: int) -> Words:
    """Words of a [2, W] list: token ids end to end, then the cumulative end of each word, padded with -1. Empty words
    are skipped.
    """
    if name not in tensors:
        return ()
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


def write_tensors(tensors: Tensors, rows: list[Row], answers: list[Finished]) -> dict[str, NDArray[Any]]:
    """Output tensors of one request by name; `answers` holds those of the first row, then those of the next.

    `output_ids` uint32 [B, n, L + most new tokens asked for] is prompt and new tokens, then the end id;
    `sequence_length` uint32 [B, n] counts both. `cum_log_probs` float32 [B, n] and `output_log_probs` float32 [B, n,
    new] are empty ([B, 0] and [B, n, 0]) if no row asked for them. `finish_reason` object (bytes) [B, n].
    """
    batch, copies = len(rows), rows[0].beam_width * rows[0].num_return_sequences
    requests = [(row, params) for row in rows for params in row.requests]
    flat = [
        (row, params, result)
        for (row, params), answer in zip(requests, answers, strict=True)
        for result in answer.results
    ]
    longest_prompt = max(tensors["input_ids"].shape[1], *(len(row.prompt) for row in rows), 1)
    width = longest_prompt + max(params.request_output_len for _, params in requests)
    new = max(len(result.log_probs) for _, _, result in flat)

    output_ids = np.empty((len(flat), width), np.uint32)
    output_log_probs = np.zeros((len(flat), new), np.float32)
    lengths = np.empty(len(flat), np.uint32)
    for index, (row, params, result) in enumerate(flat):
        tokens = row.prompt + result.tokens
        lengths[index] = len(tokens)
        output_ids[index, : len(tokens)] = tokens
        output_ids[index, len(tokens) :] = params.end_id
        output_log_probs[index, : len(result.log_probs)] = result.log_probs
    reasons = np.array([result.finish_reason.encode() for _, _, result in flat], np.object_)
    return {
        "output_ids": output_ids.reshape(batch, copies, width),
        "sequence_length": lengths.reshape(batch, copies),
        "cum_log_probs": output_log_probs.sum(axis=1).reshape(batch, -1)[:, : copies if new else 0],
        "output_log_probs": output_log_probs.reshape(batch, copies, new),
        "finish_reason": reasons.reshape(batch, copies),
    }


def passed_through(tensors: Tensors, rows: list[Row]) -> dict[str, NDArray[Any]]:
    """The streaming model's outputs that say what was asked, by name: `input_lengths` and `end_id` uint32 [B, 1], and
    those of PASSED_THROUGH that the request has, as they came.
    """
    return {
        "input_lengths": np.array([[len(row.prompt)] for row in rows], np.uint32),
        "end_id": np.array([[row.requests[0].end_id] for row in rows], np.uint32),
        **{name: tensors[name] for name in PASSED_THROUGH if name in tensors},
    }


class PieceTensors:
    """The outputs of a streamed request, a piece at a time: arrays that fill up as tokens come. Sequence i is the i-th
    of all rows' sequences.

    Not thread-safe, but what `piece` returns is not written to any more; an output that is the same in several pieces
    is the same array.
    """

    def __init__(self, tensors: Tensors, rows: list[Row]) -> None:
        requests = [(row.prompt, params) for row in rows for params in row.requests]
        width = max(len(prompt) + params.request_output_len for prompt, params in requests)
        self._shape = len(rows), rows[0].num_return_sequences
        self._prompts = [len(prompt) for prompt, _ in requests]
        self._ids = np.empty((len(requests), width), np.uint32)
        for index, (prompt, params) in enumerate(requests):
            self._ids[index, : len(prompt)] = prompt
            self._ids[index, len(prompt) :] = params.end_id
        self._lengths = np.array(self._prompts, np.uint32)
        self._previous = self._lengths.copy()
        new = max(params.request_output_len for _, params in requests)
        asked = any(params.is_return_log_probs for _, params in requests)
        self._log_probs = np.zeros((len(requests), new), np.float32) if asked else None
        self._reasons = np.full(self._shape, b"", np.object_)
        self._constant = {
            "finish_reason": np.full(self._shape, b"", np.object_),
            "cum_log_probs": np.zeros((len(rows), 0), np.float32),
            "output_log_probs": np.zeros((*self._shape, 0), np.float32),
            **passed_through(tensors, rows),
        }

    def add(self, index: int, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """New tokens of one sequence."""
        start = int(self._lengths[index])
        self._ids[index, start : start + len(tokens)] = tokens
        self._lengths[index] = start + len(tokens)
        if log_probs and self._log_probs is not None:
            start -= self._prompts[index]
            self._log_probs[index, start : start + len(log_probs)] = log_probs

    def end(self, index: int, result: Result) -> None:
        """The whole result of one sequence, whatever of it was added before."""
        known = int(self._lengths[index]) - self._prompts[index]
        self.add(index, result.tokens[known:], result.log_probs[known:])
        self._reasons.flat[index] = result.finish_reason.encode()

    def piece(self, last: bool, cancel_handles: Sequence[bytes] = ()) -> dict[str, NDArray[Any]]:
        """Output tensors by name: all tokens so far, and how many of them earlier pieces had.

        `output_ids` uint32 [B, n, longest so far], the end id behind shorter ones; the reasons with the `last` piece
        alone; `cancel_handle` if `cancel_handles`, one a sequence, are given; the rest as `write_tensors` has it.
        """
        width = int(self._lengths.max())
        outputs = {
            **self._constant,
            "output_ids": self._ids[:, :width].copy().reshape(*self._shape, width),
            "sequence_length": self._lengths.reshape(self._shape),
            "previous_length": self._previous.reshape(self._shape),
        }
        if self._log_probs is not None:
            new = max(length - prompt for length, prompt in zip(self._lengths.tolist(), self._prompts, strict=True))
            log_probs = self._log_probs[:, :new].copy()
            outputs["cum_log_probs"] = log_probs.sum(axis=1).reshape(self._shape)
            outputs["output_log_probs"] = log_probs.reshape(*self._shape, new)
        if last:
            outputs["finish_reason"] = self._reasons
        if cancel_handles:
            outputs["cancel_handle"] = np.array(cancel_handles, np.object_).reshape(self._shape)
        self._previous = self._lengths
        self._lengths = self._lengths.copy()
        return outputs
