"""The Triton backend `fastertransformer`: one answer a request, from an engine process that all its models share.

Triton loads this file for every model with `backend: "fastertransformer"`. It knows Triton's calls; the tensors are the
business of `triton_io`, everything else that of the engine. `execute` returns at once; answers are sent as they arrive,
each on its own.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from gptj_engine.client import Answer, EngineClient
from gptj_engine.config import EngineConfig
from gptj_engine.errors import ConfigError, InvalidRequestError, UnavailableError
from gptj_engine.lifetime import own_server_pid
from gptj_engine.messages import Finished, Refused
from triton_io import Row, Tensors, read_rows, write_tensors

DEFAULT_CHECKPOINT = "storyteller"  # in the model's version directory


class TritonPythonModel:
    """Triton's interface to a model of this backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start or join the engine; raises TritonModelException with the engine's reason when it cannot start."""
        model_config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in model_config.get("parameters", {}).items()}
        version = Path(args["model_repository"]) / args["model_version"]
        try:
            config = EngineConfig.from_parameters(parameters, version / DEFAULT_CHECKPOINT)
            self.engine = EngineClient(config, server_pid=own_server_pid(), name=f"{args['model_name']}-{os.getpid()}")
        except ConfigError as error:
            raise pb_utils.TritonModelException(f"cannot serve GPT-J: {error}") from None

    def execute(self, requests: list[Any]) -> None:
        """Hand every sequence of every request to the engine; each request is answered when its last one has ended."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                rows = read_rows(tensors, self.engine.model)
            except InvalidRequestError as error:
                send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception as error:
                pb_utils.Logger.log_error(f"a request could not be read: {error!r}")
                send_error(sender, f"the request could not be read: {error}", pb_utils.TritonError.INTERNAL)
            else:
                Reply(tensors, rows, sender).submit(self.engine)

    def finalize(self) -> None:
        """Leave the engine. Triton has waited for the requests under way, or given up on them."""
        self.engine.close()


class Reply:
    """The one response to a request, sent when all of its sequences have been answered."""

    def __init__(self, tensors: Tensors, rows: list[Row], sender: Any) -> None:
        self._tensors = tensors
        self._rows = rows
        self._sender = sender
        self._lock = threading.Lock()  # answers come on the engine client's thread, also while submit still runs
        self._missing = sum(len(row.requests) for row in rows)
        self._answers: list[Answer | None] = [None] * self._missing

    def submit(self, engine: EngineClient) -> None:
        """Send all sequences to the engine."""
        sequences = [(row.prompt, params) for row in self._rows for params in row.requests]
        for index, (prompt, params) in enumerate(sequences):
            try:
                engine.submit(prompt, params, functools.partial(self._take, index))
            except UnavailableError as error:
                self._take(index, Refused(index, str(error), invalid=False))

    def _take(self, index: int, answer: Answer) -> None:
        with self._lock:
            self._answers[index] = answer
            self._missing -= 1
            if self._missing:
                return
        refused = next((answer for answer in self._answers if isinstance(answer, Refused)), None)
        if refused is not None:
            code = pb_utils.TritonError.INVALID_ARG if refused.invalid else pb_utils.TritonError.UNAVAILABLE
            send_error(self._sender, refused.message, code)
            return
        finished = [answer for answer in self._answers if isinstance(answer, Finished)]
        try:
            outputs = write_tensors(self._tensors, self._rows, finished)
            response = pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])
        except Exception as error:  # this thread answers all other requests, too
            pb_utils.Logger.log_error(f"an answer could not be written: {error!r}")
            send_error(self._sender, f"the answer could not be written: {error}", pb_utils.TritonError.INTERNAL)
        else:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def send_error(sender: Any, message: str, code: int) -> None:
    """Answer a request with an error, which is always its last response."""
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
