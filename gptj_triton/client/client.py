"""The class `Client`: three protocols, one kind of answer."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import Any

from gptj_triton.client.address import host_and_port
from gptj_triton.client.answer import Answer
from gptj_triton.client.errors import InvalidFieldError
from gptj_triton.client.generate import GenerateEndpoint
from gptj_triton.client.infer import InferEndpoint
from gptj_triton.client.request import check

DEFAULT_URLS = {"generate": "localhost:8000", "http": "localhost:8000", "grpc": "localhost:8001"}


class Client:
    """A connection to one server, for one thread. Close it, or use it in a `with` statement.

    `url` is HOST:PORT, `protocol` one of generate, http, grpc; `timeout` (seconds) is for connecting and for an
    answer, or each piece of one. Raises InvalidFieldError for other protocols and URLs.
    """

    def __init__(self, url: str | None = None, protocol: str = "generate", timeout: float = 300.0) -> None:
        if protocol not in DEFAULT_URLS:
            raise InvalidFieldError(f"protocol {protocol!r}: give one of {', '.join(DEFAULT_URLS)}")
        url = host_and_port(url or DEFAULT_URLS[protocol])
        self._protocol = protocol
        self._endpoint = (
            GenerateEndpoint(url, timeout) if protocol == "generate" else InferEndpoint(url, protocol, timeout)
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
