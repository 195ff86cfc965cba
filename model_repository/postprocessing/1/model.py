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


class TritonPythonModel:
    """One instance; Triton calls `initialize` once and `execute` with the requests that wait."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; `args` as Triton's Python backend gives them."""
        parameters = json.loads(args["model_config"])["parameters"]
        repository = Path(args["model_repository"]).parent
        self.decoder = token_text.TokenText.load(repository / parameters["tokenizer_dir"]["string_value"])
        self.reports = cancel_reports.CancelReports()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return [self.answer(request) for request in requests]

    def finalize(self) -> None:
        """Close the connections to those that were told of clients that left."""
        self.reports.close()

    def answer(self, request: Any) -> Any:
        """The response to one request of any number of rows."""
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        # Of a stream through an ensemble only this step learns that its client left; asking costs a round trip.
        if "cancel_handle" in inputs and request.is_cancelled():
            for failure in self.reports.send(set(inputs["cancel_handle"].ravel().tolist())):
                pb_utils.Logger.log_warn(failure)
        outputs = self.outputs(inputs)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])

    def outputs(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name. B rows of n sequences: [B, n], and [B, 0] for counts that no row asked for, or yet to
        come."""
        lengths = inputs["sequence_length"]  # [B, n]
        rows, sequences = lengths.shape
        prompt_lengths = inputs["input_lengths"].reshape(rows, 1).astype(np.int32)
        previous_lengths = inputs.get("previous_length", np.broadcast_to(prompt_lengths, lengths.shape))
        texts = np.empty((rows, sequences), dtype=np.object_)
        reasons = np.empty((rows, sequences), dtype=np.object_)
        counts = np.empty((rows, sequences), dtype=np.int32)
        for row, sequence in np.ndindex(rows, sequences):
            ids = inputs["output_ids"][row, sequence]
            piece = self.decoder.piece(
                ids=ids[: lengths[row, sequence]],
                prompt_length=int(prompt_lengths[row, 0]),
                previous_length=int(previous_lengths[row, sequence]),
                end_id=int(inputs["end_id"][row, 0]),
                stop_words=inputs["stop_words"][row].tolist() if "stop_words" in inputs else (),
                reason=inputs["finish_reason"][row, sequence].decode() if "finish_reason" in inputs else "length",
                with_prompt="exclude_input_in_output" in inputs and not inputs["exclude_input_in_output"][row, 0],
            )
            texts[row, sequence] = piece.text.encode()
            reasons[row, sequence] = piece.finish_reason.encode()
            counts[row, sequence] = piece.num_output_tokens
        last = all(reasons.flat)
        none = np.empty((rows, 0), dtype=np.int32)
        return {
            "text_output": texts,
            "finish_reason": reasons,
            "num_input_tokens": prompt_lengths if last and _asked(inputs, "return_num_input_tokens") else none,
            "num_output_tokens": counts if last and _asked(inputs, "return_num_output_tokens") else none,
        }


def _asked(inputs: dict[str, NDArray[Any]], flag: str) -> bool:
    """Whether any row of the request sets `flag`: one tensor answers for all."""
    return flag in inputs and bool(inputs[flag].any())
