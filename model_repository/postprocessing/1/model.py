"""The postprocessing step of the ensemble: FasterTransformer's output tensors to text.

Only the seam to Triton; decoding stands in token_text.py. Knows nothing of the engine, and also serves a backend that
returns FasterTransformer's outputs alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """The response to one request of any number of rows."""
        outputs = self.outputs({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])

    def outputs(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name. B rows of n sequences: [B, n], and [B, 0] for counts that no row asked for."""
        lengths = inputs["sequence_length"]  # [B, n]
        rows, sequences = lengths.shape
        prompt_lengths = inputs["input_lengths"].reshape(rows, 1).astype(np.int32)
        texts = np.empty((rows, sequences), dtype=np.object_)
        reasons = np.empty((rows, sequences), dtype=np.object_)
        counts = np.empty((rows, sequences), dtype=np.int32)
        for row, sequence in np.ndindex(rows, sequences):
            prompt_length, ids = int(prompt_lengths[row, 0]), inputs["output_ids"][row, sequence]
            finished = self.decoder.finish(
                ids=ids[: lengths[row, sequence]].tolist(),
                prompt_length=prompt_length,
                end_id=int(inputs["end_id"][row, 0]),
                stop_words=inputs["stop_words"][row].tolist() if "stop_words" in inputs else (),
                reason=inputs["finish_reason"][row, sequence].decode() if "finish_reason" in inputs else None,
                with_prompt="exclude_input_in_output" in inputs and not inputs["exclude_input_in_output"][row, 0],
            )
            texts[row, sequence] = finished.text.encode()
            reasons[row, sequence] = finished.finish_reason.encode()
            counts[row, sequence] = finished.num_output_tokens
        unasked = np.empty((rows, 0), dtype=np.int32)
        return {
            "text_output": texts,
            "finish_reason": reasons,
            "num_input_tokens": prompt_lengths if _asked(inputs, "return_num_input_tokens") else unasked,
            "num_output_tokens": counts if _asked(inputs, "return_num_output_tokens") else unasked,
        }


def _asked(inputs: dict[str, NDArray[Any]], flag: str) -> bool:
    """Whether any row of the request sets `flag`: one tensor answers for all."""
    return flag in inputs and bool(inputs[flag].any())
