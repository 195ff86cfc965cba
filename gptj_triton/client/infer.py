"""Triton's `infer`, over HTTP or gRPC, and its streams over gRPC: tensors, by tritonclient."""

from __future__ import annotations

import contextlib
import importlib
import queue
from collections.abc import Generator
from http.client import HTTPException
from typing import Any

from tritonclient.utils import InferenceServerException

from gptj_triton.api_key import grpc_metadata, http_header
from gptj_triton.client.answer import Answer
from gptj_triton.client.errors import (
    NO_GRPC,
    NO_HTTP,
    NOT_NOW,
    RESTRICTED,
    ClientError,
    ConnectionFailedError,
    KeyRefusedError,
    NoAnswerInTimeError,
    not_from_triton,
    one_line,
    reason,
    server_error,
)
from gptj_triton.client.proxy import Proxy, grpc_proxy, through
from gptj_triton.client.request import MODEL, OUTPUTS, STREAMING_MODEL, require_outputs, tensors
from gptj_triton.fields import BY_NAME

# How gRPC's message begins where a server does not speak gRPC, and where a proxy does not speak HTTP.
GRPC_WORDS = {"Failed parsing HTTP/2": NO_GRPC, "Expected 'H'": NO_HTTP}
# tritonclient's own words for a body that is empty.
EMPTY_BODY = "client received an empty response from the server."


class InferEndpoint:
    """tritonclient's `infer`, whose HTTP and gRPC halves are alike but for where the timeout goes."""

    def __init__(self, url: str, protocol: str, timeout: float, api_key: str | None) -> None:
        self._timeout = timeout
        self._triton = importlib.import_module(f"tritonclient.{protocol}")
        grpc = protocol == "grpc"
        key_header = grpc_metadata if grpc else http_header
        self._headers = None if api_key is None else key_header(api_key)
        self._infer_options = {"client_timeout": timeout} if grpc else {}
        proxy = grpc_proxy(url) if grpc else None  # tritonclient's HTTP takes no proxy
        self._way = through(url, proxy)
        options: dict[str, Any] = {"channel_args": _channel_arguments(proxy)}
        if not grpc:
            options = {"connection_timeout": timeout, "network_timeout": timeout}
        self._client = self._triton.InferenceServerClient(url, **options)

    def close(self) -> None:
        self._client.close()

    def ask(self, prompts: list[str], fields: dict[str, Any]) -> list[Answer]:
        try:
            inputs = self._inputs(prompts, fields)
            result = self._client.infer(MODEL, inputs, headers=self._headers, **self._infer_options)
        except InferenceServerException as error:
            raise self._translated(error) from None
        except TimeoutError:
            raise NoAnswerInTimeError(f"no answer from {self._way} in {self._timeout:g} s") from None
        except (OSError, HTTPException) as error:
            raise ConnectionFailedError(f"cannot reach {self._way}: {reason(error)}") from None
        except ValueError as error:
            raise not_from_triton("200", self._way, str(error)) from None
        self._require_outputs(result)
        return [self._answer(result, row) for row in range(len(prompts))]

    def stream(self, prompt: str, fields: dict[str, Any]) -> Generator[Answer, None, None]:
        inputs = self._inputs([prompt], fields)
        arrived: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: arrived.put((result, error)), headers=self._headers)
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
                    self._require_outputs(result)
                    yield self._answer(result, 0)
        except queue.Empty:
            raise NoAnswerInTimeError(f"no answer from {self._way} in {self._timeout:g} s") from None
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
        if RESTRICTED in message:
            return KeyRefusedError(status.removeprefix("StatusCode."))
        if status == "StatusCode.DEADLINE_EXCEEDED":
            return NoAnswerInTimeError(f"no answer from {self._way} in {self._timeout:g} s")
        if status == "StatusCode.UNAVAILABLE" and not NOT_NOW.match(message) and not self._live():
            words = message.rsplit(": ", 1)[-1].rstrip("]")
            for beginning, meaning in GRPC_WORDS.items():
                words = meaning if words.startswith(beginning) else words
            return ConnectionFailedError(f"cannot reach {self._way}: {words}")
        if status.isdigit() and (error.debug_details() or message == EMPTY_BODY):  # over HTTP: no JSON
            return not_from_triton(status, self._way, error.debug_details() or "")
        return server_error(message, status.removeprefix("StatusCode."))

    @staticmethod
    def _require_outputs(result: Any) -> None:
        """Raises ServerError for an answer without this project's outputs, whatever JSON it may be."""
        present: list[str] = []
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            present += [name for name in OUTPUTS if result.get_output(name) is not None]
        require_outputs(present)

    def _live(self) -> bool:
        try:
            return bool(self._client.is_server_live(client_timeout=5.0))
        except InferenceServerException:
            return False

    @staticmethod
    def _answer(result: Any, row: int) -> Answer:
        def values(name: str) -> list[Any]:
            array = result.as_numpy(name)
            found: list[Any] = [] if array is None else array[row].tolist()
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
            output_log_probs=values("output_log_probs"),
        )


def _channel_arguments(proxy: Proxy | None) -> list[tuple[str, Any]]:
    """gRPC's: messages of any size, as tritonclient has it, and this proxy or none, whatever gRPC itself would take."""
    sizes = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return [*sizes, ("grpc.http_proxy", proxy.url) if proxy else ("grpc.enable_http_proxy", 0)]
