"""The preprocessing step of the ensemble: the text and fields of a request to FasterTransformer's tensors.

Only the seam to Triton: what a field may be stands in request_fields.py, tokenising in prompt_tokens.py, layouts in
token_tensors.py. Knows nothing of the engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import prompt_tokens
import request_fields
import token_tensors
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray


class TritonPythonModel:
    """One instance; Triton calls `initialize` once and `execute` with the requests that wait."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; `args` as Triton's Python backend gives them."""
        parameters = json.loads(args["model_config"])["parameters"]
        repository = Path(args["model_repository"]).parent
        self.prompts = prompt_tokens.PromptTokens.load(repository / parameters["tokenizer_dir"]["string_value"])
        self.limits = request_fields.Limits(
            self.prompts.context_length, self.prompts.vocab_size, self.prompts.longest_token
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request: its tensors, or the error that names the field."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """The response to one request of any number of rows; a row that cannot be served fails the whole request."""
        try:
            request_fields.check_parameters(request.parameters())
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            tensors = self.tensors(request_fields.read_rows(arrays, self.limits), set(request.requested_output_names()))
        except request_fields.FieldError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])

    def tensors(self, rows: list[request_fields.Row], wanted: set[str]) -> dict[str, NDArray[Any]]:
        """The outputs by name for checked rows; stop_words_list only where `wanted` has it. Raises FieldError."""
        prompts, lengths = [], []
        for index, row in enumerate(rows):
            try:
                prompts.append(self.prompts.encode(row.text_input))
                lengths.append(request_fields.new_token_limit(row, len(prompts[-1]), self.limits))
            except request_fields.FieldError as error:
                raise request_fields.FieldError(f"{request_fields.row_prefix(index, len(rows))}{error}") from None
        end_ids = [self.prompts.end_id if row.end_id is None else row.end_id for row in rows]
        top_k, top_p = zip(*(row.sampling for row in rows), strict=True)
        column = token_tensors.column
        tensors = {
            "input_ids": token_tensors.pad_right(prompts, end_ids),
            "input_lengths": column([len(ids) for ids in prompts], np.uint32),
            "request_output_len": column(lengths, np.uint32),
            "end_id": column(end_ids, np.uint32),
            "runtime_top_k": column(top_k, np.uint32),
            "runtime_top_p": column(top_p, np.float32),
            "random_seed": token_tensors.seeds([row.seed for row in rows]),
            "beam_width": column([row.beam_width for row in rows], np.uint32),
            "min_length": column([row.min_tokens for row in rows], np.uint32),
            "bad_words_list": token_tensors.word_lists([self.prompts.word_sequences(row.bad_words) for row in rows]),
        }
        if "stop_words_list" in wanted:
            tensors["stop_words_list"] = token_tensors.word_lists(
                [self.prompts.word_sequences(row.stop_words) for row in rows]
            )
        return tensors
