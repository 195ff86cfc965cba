"""Triton's `generate` and `generate_stream`: JSON over HTTP."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Generator, Iterator
from typing import Any

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from gptj_triton.api_key import http_header
from gptj_triton.client.address import is_this_machine
from gptj_triton.client.answer import Answer
from gptj_triton.client.errors import (
    ConnectionFailedError,
    InvalidFieldError,
    NoAnswerInTimeError,
    ServerError,
    not_from_triton,
    reason,
    server_error,
)
from gptj_triton.client.events import EventReader
from gptj_triton.client.proxy import http_proxy, through
from gptj_triton.client.request import MODEL, PROMPT, STREAMING_MODEL, encoded, require_outputs

OK = 200  # the only status of an answer


def with_key(headers: dict[str, str], request: requests.PreparedRequest) -> requests.PreparedRequest:
    request.headers.update(headers)
    return request


class GenerateEndpoint:
    """POST /v2/models/ensemble/generate, and /v2/models/ensemble_stream/generate_stream."""

    def __init__(self, url: str, timeout: float, api_key: str | None) -> None:
        self._url, self._timeout = url, timeout
        self._session = requests.Session()
        self._session.trust_env = not is_this_machine(url)  # else it would ask a proxy for this machine
        if api_key is not None:
            # Not as a mere header: `requests` would put what ~/.netrc says of the host in its place.
            self._session.auth = functools.partial(with_key, http_header(api_key))
        self._way = through(url, http_proxy(url))

    def close(self) -> None:
        self._session.close()

    def ask(self, prompts: list[str], fields: dict[str, Any]) -> list[Answer]:
        with self._errors_translated():
            return [self._answer(self._json(self._post(f"{MODEL}/generate", prompts[0], fields)))]

    def stream(self, prompt: str, fields: dict[str, Any]) -> Generator[Answer, None, None]:
        with self._errors_translated(), self._post(f"{STREAMING_MODEL}/generate_stream", prompt, fields) as response:
            if response.status_code != OK:
                self._json(response)
            reader, begun = EventReader(), False
            for chunk in response.iter_content(chunk_size=None):  # leaving the block closes the connection
                for event in self._events(reader, chunk):
                    begun = True
                    yield self._answer(event)
            if reader.rest or not begun:
                raise not_from_triton(str(OK), self._way, reader.rest.decode(errors="replace"))

    def _post(self, path: str, prompt: str, fields: dict[str, Any]) -> requests.Response:
        """The response to a request; of a stream only its head has been read."""
        encoded(PROMPT, prompt)
        body = {PROMPT: prompt} | fields
        url, stream = f"http://{self._url}/v2/models/{path}", path.endswith("_stream")
        # A redirection is not followed: Triton sends none, and the request would go on as a GET.
        return self._session.post(url, json=body, timeout=self._timeout, stream=stream, allow_redirects=False)

    @contextlib.contextmanager
    def _errors_translated(self) -> Iterator[None]:
        """Turns exceptions of `requests` into ours."""
        try:
            yield
        except requests.exceptions.InvalidJSONError:
            raise InvalidFieldError("JSON has no NaN and no infinity: use protocol http or grpc") from None
        except (requests.exceptions.RequestException, HTTPError) as error:  # requests lets some of urllib3's through
            # Between two pieces of a stream, requests calls it a broken connection.
            pause = any(isinstance(cause, ReadTimeoutError) for cause in error.args)
            if pause or isinstance(error, requests.exceptions.Timeout):
                raise NoAnswerInTimeError(f"no answer from {self._way} in {self._timeout:g} s") from None
            raise ConnectionFailedError(f"cannot reach {self._way}: {reason(error)}") from None

    def _json(self, response: requests.Response) -> dict[str, Any]:
        """The object in a response that is no stream. Raises ServerError for an error."""
        status = str(response.status_code)
        text = response.text.removeprefix("data:")  # as Triton begins the refusal of a stream, too
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "error" in answer:
            raise server_error(str(answer["error"]), status)
        if not isinstance(answer, dict) or response.status_code != OK:
            raise not_from_triton(status, self._way, text or response.headers.get("Location", ""))
        return answer

    @staticmethod
    def _events(reader: EventReader, chunk: bytes) -> Iterator[dict[str, Any]]:
        """The events that a chunk of a stream completes. Raises ServerError for an error, or what is no event."""
        try:
            events = reader.feed(chunk)
        except ValueError as error:
            raise ServerError(str(error), "") from None
        for event in events:
            if not isinstance(event, dict):
                raise ServerError(f"not an event of {STREAMING_MODEL}: {event!r:.200}", "")
            if "error" in event:
                raise server_error(str(event["error"]), "")
            yield event

    @staticmethod
    def _answer(values: dict[str, Any]) -> Answer:
        require_outputs(values)
        answer = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
        log_probs, sequences = answer.get("output_log_probs", []), len(answer["text_output"])
        new = len(log_probs) // sequences if sequences else 0  # the endpoint flattens [sequences, new]
        return Answer(
            text=answer["text_output"],
            finish_reason=answer["finish_reason"],
            sequence_length=answer["sequence_length"],
            num_input_tokens=next(iter(answer.get("num_input_tokens", [])), None),
            num_output_tokens=answer.get("num_output_tokens", []),
            cum_log_probs=answer.get("cum_log_probs", []),
            output_log_probs=[log_probs[i * new : (i + 1) * new] for i in range(sequences)] if new else [],
        )
