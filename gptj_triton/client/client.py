"""The class `Client`: three protocols, one kind of answer."""

from __future__ import annotations

import os
from collections.abc import Generator
from types import TracebackType
from typing import Any

from gptj_triton.api_key import ENVIRONMENT, ApiKeyError, checked
from gptj_triton.client.address import host_and_port
from gptj_triton.client.answer import Answer
from gptj_triton.client.errors import InvalidFieldError
from gptj_triton.client.generate import GenerateEndpoint
from gptj_triton.client.infer import InferEndpoint
from gptj_triton.client.request import check

DEFAULT_URLS = {"generate": "localhost:8000", "http": "localhost:8000", "grpc": "localhost:8001"}


def known_key(given: str | None) -> str | None:
    """The key to send: the one that was given, else the environment's, else none."""
    key, source = (os.environ.get(ENVIRONMENT), ENVIRONMENT) if given is None else (given, "api_key")
    try:
        return checked(key, source) if key else None
    except ApiKeyError as error:
        raise InvalidFieldError(str(error)) from None


class Client:
    """A connection to one server, for one thread. Close it, or use it in a `with` statement.

    `url` is HOST:PORT, `protocol` one of generate, http, grpc; `timeout` (seconds) is for connecting and for an
    answer, or each piece of one; `api_key` is what the server's --api-key-file holds, else the environment variable
    GPTJ_TRITON_API_KEY is, if it is set. Raises InvalidFieldError for other protocols, URLs and keys.
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: str = "generate",
        timeout: float = 300.0,
        api_key: str | None = None,
    ) -> None:
        if protocol not in DEFAULT_URLS:
            raise InvalidFieldError(f"protocol {protocol!r}: give one of {', '.join(DEFAULT_URLS)}")
        url = host_and_port(url or DEFAULT_URLS[protocol])
        self._protocol = protocol
        key = known_key(api_key)
        self._endpoint = (
            GenerateEndpoint(url, timeout, key)
            if protocol == "generate"
            else InferEndpoint(url, protocol, timeout, key)
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._endpoint.close()

    def generate(self, prompt: str, **fields: Any) -> Answer:
        """Asks for one prompt. `fields` are request fields; one of several words takes a list of strings.

        Raises ClientError's subclasses."""
        check(fields)
        return self._endpoint.ask([prompt], fields)[0]

    def stream(self, prompt: str, **fields: Any) -> Generator[Answer, None, None]:
        """Asks for one prompt, by `generate` or `grpc`, and yields the answer in pieces as they come.

        Closing the generator ends the request on the server. Raises ClientError's subclasses."""
        if self._protocol == "http":
            raise InvalidFieldError("protocol http cannot stream: use generate or grpc")
        check(fields)
        return self._endpoint.stream(prompt, fields)

    def generate_batch(self, prompts: list[str], **fields: Any) -> list[Answer]:
        """Asks for all prompts in one request, by `http` or `grpc`. Each field holds for every prompt.

        Raises ClientError's subclasses."""
        if self._protocol == "generate":
            raise InvalidFieldError("protocol generate takes one prompt a request: use http or grpc for batches")
        check(fields)
        return self._endpoint.ask(prompts, fields)
