"""The Triton backend `fastertransformer`: requests to an engine process that all its models share.

Every model with `backend: "fastertransformer"` is a frontend of the engine; one that is decoupled streams. This file
knows Triton's calls; tensors.py reads the tensors, and replies.py decides when a response is sent. `execute` returns at
once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from gptj_triton.engine.metrics import RequestMetrics
from gptj_triton.errors import ConfigError, InvalidRequestError
from gptj_triton.process.client import EngineClient
from gptj_triton.triton import log
from gptj_triton.triton.carried_errors import ENDING, asks_to_carry, carry
from gptj_triton.triton.metrics import PublishedMetrics
from gptj_triton.triton.model_settings import read_settings
from gptj_triton.triton.replies import Outputs, Replies, Reply, StreamReply
from gptj_triton.triton.request_parameters import read_parameters
from gptj_triton.triton.string_tensors import limit_strings
from gptj_triton.triton.stubs import own_server_pid
from gptj_triton.triton.tensors import lacks_batch_dimension, read_rows, read_stream, read_timeout, refuse_no_rows

ENGINE_MODULE = "gptj_triton.triton.engine_process"


class TritonPythonModel:
    """Triton's interface to a model of this backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start or join the engine; raises TritonModelException with the engine's reason when it cannot start."""
        log.log_to_triton(args["model_name"])
        self.metrics = PublishedMetrics(args["model_name"], RequestMetrics)
        try:
            settings = read_settings(
                json.loads(args["model_config"]), Path(args["model_repository"]), args["model_version"]
            )
            # The name of a socket too, which must be short.
            self.engine = EngineClient(
                settings.engine,
                own_server_pid(),
                str(os.getpid()),
                ENGINE_MODULE,
                args["model_name"],
                self.metrics.take_report,
            )
        except ConfigError as error:
            self.metrics.close()
            raise pb_utils.TritonModelException(f"cannot serve GPT-J: {error}") from None
        self.limits = settings.limits
        limit_strings(pb_utils, self.limits.max_request_strings)
        self.batches, self.decoupled = settings.batches, settings.decoupled
        self.replies = Replies(self.engine, settings.pace, self.metrics.count)

    def execute(self, requests: list[Any]) -> None:
        """Hand every sequence of every request to the engine; `replies` answers them."""
        for request in requests:
            responder = TritonResponder(request)
            try:
                tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                if self.batches:
                    refuse_no_rows(tensors, "input_ids", 2)
                elif lacks_batch_dimension(tensors):
                    responder.is_single_row = True
                    tensors = {name: array[np.newaxis] for name, array in tensors.items()}
                parameters = read_parameters(request.parameters(), self.limits)
                timeout = read_timeout(request.timeout(), parameters)
                rows = read_rows(tensors, self.engine.engine_info, self.limits)
                if self.decoupled and read_stream(tensors, rows):
                    reply: Reply = StreamReply(tensors, rows, responder)
                else:
                    reply = Reply(tensors, rows, responder, pass_through=self.decoupled)
            except InvalidRequestError as error:
                self.metrics.count(RequestMetrics(request_refused_total={"invalid": 1}))
                responder.refuse(str(error))
            except Exception as error:
                self.metrics.count(RequestMetrics(request_failed_total=1))
                responder.fail_by(error)
            else:
                self.replies.submit(reply, rows, timeout)

    def finalize(self) -> None:
        """Leave the engine. Triton has waited for the requests in flight, or given up on them."""
        self.engine.close()
        self.replies.close()
        self.metrics.close()


class TritonResponder:
    """Where the responses to one request of Triton's go."""

    def __init__(self, request: Any) -> None:
        self.request_id = log.id_of(request)
        self.is_single_row = False  # whether its tensors come, and go, without a batch dimension
        self._request = request
        self._sender = request.get_response_sender()
        self._carries_errors = asks_to_carry(request)
        self._tensors: dict[str, tuple[NDArray[Any], Any]] = {}  # of the last response

    def send(self, outputs: Outputs, last: bool) -> None:
        """Send tensors, as the last response or as one of several; empty ones are left out."""
        # Triton 2.51's HTTP server keeps 88 bytes for ever for each output without bytes that it sends.
        outputs = {name: array for name, array in outputs.items() if array.size}
        if self._carries_errors:
            outputs[ENDING] = outputs.pop("finish_reason")
        # An array that was sent before is in shared memory already.
        kept = {name: known for name, known in self._tensors.items() if outputs.get(name) is known[0]}
        self._tensors = {name: kept.get(name) or (array, self._tensor(name, array)) for name, array in outputs.items()}
        response = pb_utils.InferenceResponse([tensor for _, tensor in self._tensors.values()])
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)

    def fail(self, message: str) -> None:
        """Say, as the last response, that the server cannot serve the request now."""
        self._send_error(log.unavailable(self.request_id, message))

    def refuse(self, message: str) -> None:
        """Say, as the last response, that the request is at fault."""
        self._send_error(log.refused(self.request_id, message))

    def fail_by(self, error: Exception) -> None:
        """Say, as the last response, that a fault of the server, `error`, ended the request."""
        self._send_error(log.failed(self.request_id, error))

    def _send_error(self, error: Any) -> None:
        if self._carries_errors and self._tensors:  # pieces may be in the steps behind this one
            ending = self._tensor(ENDING, carry(error, self._tensors[ENDING][0].shape))
            others = [tensor for name, (_, tensor) in self._tensors.items() if name != ENDING]
            response = pb_utils.InferenceResponse([*others, ending])
        else:
            response = pb_utils.InferenceResponse(error=error)
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _tensor(self, name: str, array: NDArray[Any]) -> Any:
        return pb_utils.Tensor(name, array[0] if self.is_single_row else array)

    def is_cancelled(self) -> bool:
        """Whether the client left. Triton reports it only of clients that ask this model directly, over gRPC."""
        return bool(self._request.is_cancelled())
