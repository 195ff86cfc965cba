"""Triton's `infer`, over HTTP or gRPC, and its streams over gRPC: tensors, by tritonclient."""

from __future__ import annotations

import contextlib
import importlib
import queue
from collections.abc import Generator
from http.client import HTTPException
from typing import Any

from tritonclient.utils import InferenceServerException

from gptj_triton.client.answer import Answer
from gptj_triton.client.errors import (
    ClientError,
    ConnectionFailedError,
    NoAnswerInTimeError,
    ServerError,
    one_line,
    reason,
)
from gptj_triton.client.request import MODEL, STREAMING_MODEL, tensors
from gptj_triton.fields import BY_NAME


class InferEndpoint:
    """tritonclient's `infer`, whose HTTP and gRPC halves are alike but for where the timeout goes."""

    def __init__(self, url: str, protocol: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._triton = importlib.import_module(f"tritonclient.{protocol}")
        grpc = protocol == "grpc"
        self._infer_options = {"client_timeout": timeout} if grpc else {}
        options = {} if grpc else {"connection_timeout": timeout, "network_timeout": timeout}
        self._client = self._triton.InferenceServerClient(url, **options)

    def close(self) -> None:
        self._client.close()

    def ask(self, prompts: list[str], fields: dict[str, Any]) -> list[Answer]:
        try:
            result = self._client.infer(MODEL, self._inputs(prompts, fields), **self._infer_options)
        except InferenceServerException as error:
            raise self._translated(error) from None
        except TimeoutError:
            raise NoAnswerInTimeError(f"no answer from {self._url} in {self._timeout:g} s") from None
        except (OSError, HTTPException) as error:
            raise ConnectionFailedError(f"cannot reach {self._url}: {reason(error)}") from None
        return [self._answer(result, row) for row in range(len(prompts))]

    def stream(self, prompt: str, fields: dict[str, Any]) -> Generator[Answer, None, None]:
        inputs = self._inputs([prompt], fields)
        arrived: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: arrived.put((result, error)))
        last = False
        try:
            # It refuses where the connection has failed already; why, is said by what arrives.
            with contextlib.suppress(InferenceServerException):
                self._client.async_stream_infer(STREAMING_MODEL, inputs, enable_empty_final_response=True)
            while not last:
                result, error = arrived.get(timeout=self._timeout)
                if error is not None:
                    raise self._translated(error) from None
                response = result.get_response()
                last = response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield self._answer(result, 0)
        except queue.Empty:
            raise NoAnswerInTimeError(f"no answer from {self._url} in {self._timeout:g} s") from None
        finally:
            self._client.stop_stream(cancel_requests=not last)

    def _inputs(self, prompts: list[str], fields: dict[str, Any]) -> list[Any]:
        inputs = []
        for name, array in tensors(prompts, fields).items():
            inputs.append(self._triton.InferInput(name, list(array.shape), BY_NAME[name].dtype))
            inputs[-1].set_data_from_numpy(array)
        return inputs

    def _translated(self, error: InferenceServerException) -> ClientError:
        message, status = one_line(error.message()), error.status() or ""
        if status == "StatusCode.DEADLINE_EXCEEDED":
            return NoAnswerInTimeError(f"no answer from {self._url} in {self._timeout:g} s")
        if status == "StatusCode.UNAVAILABLE" and not self._live():  # the server's own refusals look the same
            return ConnectionFailedError(f"cannot reach {self._url}: {message.rsplit(': ', 1)[-1]}")
        return ServerError(message, status.removeprefix("StatusCode."))

    def _live(self) -> bool:
        try:
            return bool(self._client.is_server_live(client_timeout=5.0))
        except InferenceServerException:
            return False

    @staticmethod
    def _answer(result: Any, row: int) -> Answer:
        def values(name: str) -> list[Any]:
            found: list[Any] = result.as_numpy(name)[row].tolist()
            return found

        def texts(name: str) -> list[bytes]:
            """Those of the row's sequences: [B] where each row has one, else [B, n]."""
            found: list[bytes] = result.as_numpy(name)[row : row + 1].ravel().tolist()
            return found

        return Answer(
            text=[text.decode(errors="replace") for text in texts("text_output")],
            finish_reason=[text.decode() for text in texts("finish_reason")],
            sequence_length=values("sequence_length"),
            num_input_tokens=next(iter(values("num_input_tokens")), None),
            num_output_tokens=values("num_output_tokens"),
            cum_log_probs=values("cum_log_probs"),
            output_log_probs=[log_probs for log_probs in values("output_log_probs") if log_probs],
        )
