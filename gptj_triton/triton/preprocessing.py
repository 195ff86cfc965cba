"""The preprocessing step of the ensemble: the text and fields of a request to FasterTransformer's tensors.

Only the calls that Triton makes: request_parameters.py and request_fields.py check what came, text/tokenizer.py makes
tokens, token_tensors.py lays them out. Knows nothing of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import DTypeLike

from gptj_triton.engine.metrics import UnansweredRequests
from gptj_triton.limits import read_limits
from gptj_triton.text import tokenizer
from gptj_triton.text.end_ids import fill_id
from gptj_triton.text.tokenizer_files import ignored_settings
from gptj_triton.triton import log, request_fields, token_tensors
from gptj_triton.triton.kept_tensors import KeptTensors
from gptj_triton.triton.metrics import PublishedMetrics
from gptj_triton.triton.model_parameters import read_model_parameters
from gptj_triton.triton.request_parameters import check_parameters, read_parameters
from gptj_triton.triton.request_size import check_sequences, check_word_bytes, id_bytes
from gptj_triton.triton.string_tensors import limit_strings

KEPT_TENSORS = 256


class TritonPythonModel:
    """One instance; Triton calls `initialize` once and `execute` with the requests that wait."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; `args` as Triton's Python backend gives them."""
        log.log_to_triton(args["model_name"])
        parameters = read_model_parameters(json.loads(args["model_config"]))
        most = read_limits(parameters)
        limit_strings(pb_utils, most.max_request_strings)
        directory = Path(args["model_repository"]).parent / parameters["tokenizer_dir"]
        self.prompts = tokenizer.PromptTokenizer.load(directory)
        for line in ignored_settings(directory):
            pb_utils.Logger.log_warn(f"ignored, tokenizer.json alone is read: {line}")
        self.limits = request_fields.PromptLimits(
            self.prompts.context_length, self.prompts.vocab_size, self.prompts.longest_token, most
        )
        self.kept = KeptTensors(KEPT_TENSORS)
        self.metrics = PublishedMetrics(args["model_name"], UnansweredRequests)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request: its tensors, or the error that names the field."""
        return [self.answer(request) for request in requests]

    def finalize(self) -> None:
        """Give Triton's memory and metrics back."""
        self.kept.clear()
        self.metrics.close()

    def answer(self, request: Any) -> Any:
        """The response to one request of any number of rows; a row that cannot be served fails the whole request."""
        try:
            unknown = check_parameters(read_parameters(request.parameters(), self.limits.most))
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            wanted = set(request.requested_output_names())
            # Only an ensemble that can stream asks for it; in any other the field must not be true.
            may_stream = "stream" in wanted
            rows = request_fields.read_fields(arrays, self.limits, unknown, may_stream)
            outputs = self.tensors(rows, wanted)
            if may_stream:
                outputs.append(pb_utils.Tensor("stream", arrays.get("stream", np.zeros((len(rows), 1), np.bool_))))
            return pb_utils.InferenceResponse(outputs)
        except request_fields.REFUSALS as error:
            self.metrics.count(UnansweredRequests(request_refused_total={"invalid": 1}))
            return pb_utils.InferenceResponse(error=log.refused(log.id_of(request), str(error)))
        except Exception as error:
            self.metrics.count(UnansweredRequests(request_failed_total=1))
            return pb_utils.InferenceResponse(error=log.failed(log.id_of(request), error))

    def tensors(self, rows: list[request_fields.RowFields], wanted: set[str]) -> list[Any]:
        """The outputs for checked rows; stop_words_list only where `wanted` has it. Raises FieldError."""
        prompts, lengths = [], []
        sequences = tokens = 0
        for index, row in enumerate(rows):
            try:
                prompts.append(self.prompts.encode(row.text_input))
                request_fields.check_tokens(prompts[-1], self.limits)
                lengths.append(request_fields.new_token_limit(row, len(prompts[-1]), self.limits))
            except request_fields.REFUSALS as error:
                raise request_fields.FieldError(f"{request_fields.row_prefix(index, len(rows))}{error}") from None
            sequences += row.num_sequences
            tokens += row.num_sequences * (len(prompts[-1]) + lengths[-1])
            check_sequences(sequences, tokens, self.limits.most)
        end_ids = [self.prompts.end_ids if row.end_id is None else (row.end_id,) for row in rows]
        fill_ids = [fill_id(ids) for ids in end_ids]
        top_k, top_p = zip(*(row.sampling for row in rows), strict=True)
        bad_words = [self.prompts.word_sequences(row.bad_words) for row in rows]
        check_word_bytes(
            (row.num_return_sequences * id_bytes(words) for row, words in zip(rows, bad_words, strict=True)),
            self.limits.most,
        )
        words = {"bad_words_list": bad_words}
        if "stop_words_list" in wanted:  # for NVIDIA's library, which also knows one end id alone
            words["stop_words_list"] = [
                self.prompts.word_sequences(row.stop_words) + [[end_id] for end_id in ids[1:]]
                for row, ids in zip(rows, end_ids, strict=True)
            ]
        return [
            pb_utils.Tensor("input_ids", token_tensors.pad_right(prompts, fill_ids)),
            pb_utils.Tensor("random_seed", token_tensors.seeds([row.seed for row in rows])),
            self.column("input_lengths", map(len, prompts), np.uint32),
            self.column("request_output_len", lengths, np.uint32),
            self.column("end_id", fill_ids, np.uint32),
            *self.end_id_lists(end_ids),
            self.column("runtime_top_k", top_k, np.uint32),
            self.column("runtime_top_p", top_p, np.float32),
            self.column("beam_width", [row.beam_width for row in rows], np.uint32),
            self.column("min_length", [row.min_tokens for row in rows], np.uint32),
            *(self.word_lists(name, each) for name, each in words.items()),
        ]

    def column(self, name: str, values: Iterable[float], dtype: DTypeLike) -> Any:
        """One value a row, [B, 1]."""
        values = tuple(values)
        return self.kept.get(name, values, lambda: token_tensors.column(values, dtype))

    def end_id_lists(self, rows: list[tuple[int, ...]]) -> list[Any]:
        """The tensor end_ids, where it is needed."""
        if not token_tensors.needs_end_ids(rows):
            return []
        return [self.kept.get("end_ids", tuple(rows), lambda: token_tensors.end_id_lists(rows))]

    def word_lists(self, name: str, rows: list[list[list[int]]]) -> Any:
        """The words of each row, token ids, as [B, 2, W]."""
        if not any(rows):
            return self.kept.get(name, (len(rows),), lambda: token_tensors.word_lists(rows))
        return pb_utils.Tensor(name, token_tensors.word_lists(rows))
