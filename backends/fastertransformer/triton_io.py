"""FasterTransformer's tensors ↔ the engine's requests and answers. Knows the contract's names and shapes; of Triton
only numpy.

B rows a request, L the padded length of its prompts, n sequences a row. A scalar field has shape [B] or [B, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from gptj_engine.errors import InvalidRequestError
from gptj_engine.messages import Finished, Welcome
from gptj_engine.sampling_params import SamplingParams
from numpy.typing import NDArray

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
    seeds = [derived_seed(params.random_seed, number) for number in range(copies)]
    return Row(prompt, [msgspec.structs.replace(params, random_seed=seed) for seed in seeds])


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
