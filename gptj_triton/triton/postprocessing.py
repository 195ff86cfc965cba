"""The postprocessing step of the ensembles: FasterTransformer's output tensors to text.

Only the calls that Triton makes: written_tokens.py reads the tensors, text/detokenizer.py makes the text. Knows nothing
of the engine but how to ask it to cancel a request, and also serves a backend that returns FasterTransformer's outputs
alone. A response of a stream brings `previous_length`; nothing is remembered between the responses of a stream, but
they must come to one instance in their order, so that the client gets them so.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from gptj_triton.errors import InvalidRequestError
from gptj_triton.limits import read_limits
from gptj_triton.process.directory import server_directory
from gptj_triton.text.detokenizer import Detokenizer
from gptj_triton.triton import log
from gptj_triton.triton.cancel_reports import CancelReports
from gptj_triton.triton.carried_errors import carried
from gptj_triton.triton.kept_tensors import KeptTensors
from gptj_triton.triton.model_parameters import read_model_parameters
from gptj_triton.triton.request_size import Tensors
from gptj_triton.triton.string_tensors import limit_strings
from gptj_triton.triton.stubs import own_server_pid
from gptj_triton.triton.written_tokens import WrittenTokens, read_sequences

KEPT_TENSORS = 64


class TritonPythonModel:
    """One instance; Triton calls `initialize` once and `execute` with the requests that wait."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; `args` as Triton's Python backend gives them."""
        log.log_to_triton(args["model_name"])
        parameters = read_model_parameters(json.loads(args["model_config"]))
        self.limits = read_limits(parameters)
        limit_strings(pb_utils, self.limits.max_request_strings)
        self.detokenizer = Detokenizer.load(Path(args["model_repository"]).parent / parameters["tokenizer_dir"])
        self.kept = KeptTensors(KEPT_TENSORS)
        self.reports = CancelReports(server_directory(own_server_pid()))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return [self.answer(request) for request in requests]

    def finalize(self) -> None:
        """Close the connections to engines, and give Triton's memory back."""
        self.reports.close()
        self.kept.clear()

    def answer(self, request: Any) -> Any:
        """The response to one request of any number of rows, or the error that names a tensor."""
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if (error := carried(inputs.get("finish_reason"))) is not None:
                return pb_utils.InferenceResponse(error=error)
            sequences = read_sequences(inputs, self.detokenizer.vocab_size, self.limits)
            # Of a stream through an ensemble only this step learns that its client left; asking costs a round trip.
            if "cancel_handle" in inputs and request.is_cancelled():
                for failure in self.reports.send(set(inputs["cancel_handle"].ravel().tolist())):
                    log.about(log.id_of(request), logging.WARNING, failure)
            return pb_utils.InferenceResponse(self.outputs(inputs, sequences))
        except InvalidRequestError as error:
            return pb_utils.InferenceResponse(error=log.refused(log.id_of(request), str(error)))
        except Exception as error:
            return pb_utils.InferenceResponse(error=log.failed(log.id_of(request), error))

    def outputs(self, inputs: Tensors, sequences: list[WrittenTokens]) -> list[Any]:
        """The outputs for B rows of n sequences: texts and reasons [B] where n is 1, else [B, n]; counts [B, 1] and
        [B, n], absent if no row asked for them. Reasons are empty strings until the last response of a stream.
        """
        rows, copies = inputs["sequence_length"].shape
        texts_shape = (rows,) if copies == 1 else (rows, copies)
        pieces = [self.detokenizer.piece(*sequence) for sequence in sequences]
        ended = all(piece.finish_reason for piece in pieces)
        reasons = tuple(piece.finish_reason.encode() if ended else b"" for piece in pieces)
        counts: dict[str, NDArray[Any]] = {}
        if _asked(inputs, "return_num_input_tokens"):
            counts["num_input_tokens"] = inputs["input_lengths"].astype(np.int32)
        if _asked(inputs, "return_num_output_tokens"):
            new = [piece.num_output_tokens for piece in pieces]
            counts["num_output_tokens"] = np.array(new, np.int32).reshape(rows, copies)
        texts = np.array([piece.text.encode() for piece in pieces], np.object_).reshape(texts_shape)
        return [
            pb_utils.Tensor("text_output", texts),
            self.kept.get(
                "finish_reason", (texts_shape, reasons), lambda: np.array(reasons, np.object_).reshape(texts_shape)
            ),
            pb_utils.Tensor("sequence_length", inputs["sequence_length"]),
            *(pb_utils.Tensor(name, count) for name, count in counts.items()),
        ]


def _asked(inputs: Tensors, flag: str) -> bool:
    """Whether any row of the request sets `flag`: one tensor answers for all."""
    return flag in inputs and bool(inputs[flag].any())
