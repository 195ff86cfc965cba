"""The postprocessing step of the ensembles: FasterTransformer's output tensors to text.

Only the seam to Triton; decoding stands in token_text.py. Knows nothing of the engine, and also serves a backend that
returns FasterTransformer's outputs alone. A response of a stream brings `previous_length`; nothing is remembered
between the responses of a stream, but one instance must get them in their order for the client to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cancel_reports
import numpy as np
import token_text
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

KEPT_SHAPES = 8  # their tensors stay in memory that is shared with Triton


class TritonPythonModel:
    """One instance; Triton calls `initialize` once and `execute` with the requests that wait."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; `args` as Triton's Python backend gives them."""
        parameters = json.loads(args["model_config"])["parameters"]
        repository = Path(args["model_repository"]).parent
        self.decoder = token_text.TokenText.load(repository / parameters["tokenizer_dir"]["string_value"])
        self.silent_tensors: dict[tuple[int, int], dict[str, Any]] = {}
        self.reports = cancel_reports.CancelReports()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return [self.answer(request) for request in requests]

    def finalize(self) -> None:
        """Close the connections to those that were told of clients that left, and give Triton's memory back."""
        self.reports.close()
        self.silent_tensors.clear()

    def answer(self, request: Any) -> Any:
        """The response to one request of any number of rows."""
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        # Of a stream through an ensemble only this step learns that its client left; asking costs a round trip.
        if "cancel_handle" in inputs and request.is_cancelled():
            for failure in self.reports.send(set(inputs["cancel_handle"].ravel().tolist())):
                pb_utils.Logger.log_warn(failure)
        outputs = self.outputs(inputs)
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        silent = self.silent(*inputs["sequence_length"].shape)
        return pb_utils.InferenceResponse(tensors + [silent[name] for name in silent if name not in outputs])

    def silent(self, rows: int, sequences: int) -> dict[str, Any]:
        """Tensors of outputs that have nothing to say: empty reasons [rows, sequences], counts [rows, 0].

        Most responses of a stream have three of them, so they are made once for each shape.
        """
        found = self.silent_tensors.get((rows, sequences))
        if found is None:
            none = np.empty((rows, 0), np.int32)
            arrays = {"num_input_tokens": none, "num_output_tokens": none}
            arrays["finish_reason"] = np.full((rows, sequences), b"", np.object_)
            found = {name: pb_utils.Tensor(name, array) for name, array in arrays.items()}
            if len(self.silent_tensors) >= KEPT_SHAPES:
                self.silent_tensors.clear()
            self.silent_tensors[rows, sequences] = found
        return found

    def outputs(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name, [B, n] for B rows of n sequences, without those that have nothing to say: reasons until
        the last response of a stream, and counts until then or if no row asked for them."""
        shape = rows, sequences = inputs["sequence_length"].shape
        lengths = inputs["sequence_length"].tolist()
        prompt_lengths = inputs["input_lengths"].ravel().tolist()
        end_ids = inputs["end_id"].ravel().tolist()
        previous = inputs["previous_length"].tolist() if "previous_length" in inputs else None
        given = inputs["finish_reason"].tolist() if "finish_reason" in inputs else None
        pieces = [
            self.decoder.piece(
                ids=inputs["output_ids"][row, sequence, : lengths[row][sequence]],
                prompt_length=prompt_lengths[row],
                previous_length=previous[row][sequence] if previous else prompt_lengths[row],
                end_id=end_ids[row],
                stop_words=inputs["stop_words"][row].tolist() if "stop_words" in inputs else (),
                reason=given[row][sequence].decode() if given else "length",
                with_prompt="exclude_input_in_output" in inputs and not inputs["exclude_input_in_output"][row, 0],
            )
            for row in range(rows)
            for sequence in range(sequences)
        ]
        outputs: dict[str, NDArray[Any]]
        outputs = {"text_output": np.array([piece.text.encode() for piece in pieces], np.object_).reshape(shape)}
        if all(piece.finish_reason for piece in pieces):
            reasons = [piece.finish_reason.encode() for piece in pieces]
            outputs["finish_reason"] = np.array(reasons, np.object_).reshape(shape)
            if _asked(inputs, "return_num_input_tokens"):
                outputs["num_input_tokens"] = np.array(prompt_lengths, np.int32).reshape(rows, 1)
            if _asked(inputs, "return_num_output_tokens"):
                counts = [piece.num_output_tokens for piece in pieces]
                outputs["num_output_tokens"] = np.array(counts, np.int32).reshape(shape)
        return outputs


def _asked(inputs: dict[str, NDArray[Any]], flag: str) -> bool:
    """Whether any row of the request sets `flag`: one tensor answers for all."""
    return flag in inputs and bool(inputs[flag].any())
