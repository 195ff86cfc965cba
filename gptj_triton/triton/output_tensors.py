"""The engine's answers to FasterTransformer's output tensors, whole or a piece at a time. Of Triton only numpy.

B rows a request, L the padded length of its prompts, n sequences a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj_triton.fields import BY_TENSOR
from gptj_triton.process.messages import Finished, Result
from gptj_triton.triton.request_size import Tensors
from gptj_triton.triton.tensors import Row
from gptj_triton.triton.token_tensors import end_id_lists, needs_end_ids

# What postprocessing needs of a streamed request, which can reach it through the streaming model alone.
PASSED_THROUGH = [name for name, field in BY_TENSOR.items() if field.postprocessing]


def write_tensors(tensors: Tensors, rows: list[Row], answers: list[Finished]) -> dict[str, NDArray[Any]]:
    """Output tensors of one request by name; `answers` holds those of the first row, then those of the next.

    `output_ids` uint32 [B, n, L + most new tokens asked for] is prompt and new tokens, then the end id;
    `sequence_length` uint32 [B, n] counts both. `cum_log_probs` float32 [B, n] and `output_log_probs` float32 [B, n,
    new] are empty ([B, 0] and [B, n, 0]) if no row asked for them. `finish_reason` object (bytes) [B, n].
    """
    batch, copies = len(rows), rows[0].beam_width * rows[0].num_return_sequences
    requests = [(row, params) for row in rows for params in row.sequences]
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
        output_ids[index, len(tokens) :] = params.fill_id
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
    those of PASSED_THROUGH that the request has, as they came; `end_ids` int32 [B, any] where `end_id` does not say it.
    """
    end_ids = [row.sequences[0].end_ids for row in rows]
    several = {"end_ids": end_id_lists(end_ids)} if needs_end_ids(end_ids) else {}
    return {
        "input_lengths": np.array([[len(row.prompt)] for row in rows], np.uint32),
        "end_id": np.array([[row.sequences[0].fill_id] for row in rows], np.uint32),
        **several,
        **{name: tensors[name] for name in PASSED_THROUGH if name in tensors},
    }


class PieceTensors:
    """The outputs of a streamed request, a piece at a time: arrays that fill up as tokens come. Sequence i is the i-th
    of all rows' sequences.

    Not thread-safe, but what `piece` returns is not written to any more; an output that is the same in several pieces
    is the same array.
    """

    def __init__(self, tensors: Tensors, rows: list[Row]) -> None:
        requests = [(row.prompt, params) for row in rows for params in row.sequences]
        width = max(len(prompt) + params.request_output_len for prompt, params in requests)
        self._shape = len(rows), rows[0].num_return_sequences
        self._prompts = [len(prompt) for prompt, _ in requests]
        self._ids = np.empty((len(requests), width), np.uint32)
        for index, (prompt, params) in enumerate(requests):
            self._ids[index, : len(prompt)] = prompt
            self._ids[index, len(prompt) :] = params.fill_id
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
