"""What a client raises, and how the words of other libraries' errors are shortened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.client import BadStatusLine

from gptj_triton.api_key import ENVIRONMENT
from gptj_triton.errors import UNAVAILABLE

# Triton's words where a key is missing or wrong, over HTTP and gRPC.
RESTRICTED = "is restricted, expecting header"
# How an error of the kind "not now" begins; Triton writes the name of an ensemble before it.
NOT_NOW = re.compile(rf"(in ensemble '[^']*', )?{UNAVAILABLE}")
NO_HTTP = "what answers is no HTTP server"
NO_GRPC = "what answers is no gRPC server"


class ClientError(Exception):
    """What can go wrong, in one line each.

    ClientError
    ├── InvalidFieldError      refused before sending: unknown name, or a value that its type cannot carry
    ├── ConnectionFailedError  no server at the URL, or the connection broke
    ├── NoAnswerInTimeError    the timeout passed
    └── ServerError            the server answered with an error; `status` is its HTTP or gRPC status, "" if a
        │                      stream gives none
        ├── KeyRefusedError    it demands a key, or another one
        └── UnavailableError   it cannot serve the request now; the same request may be sent again a little later
    """


class InvalidFieldError(ClientError):
    pass


class ConnectionFailedError(ClientError):
    pass


class NoAnswerInTimeError(ClientError):
    pass


class ServerError(ClientError):
    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


class KeyRefusedError(ServerError):
    def __init__(self, status: str) -> None:
        super().__init__(f"the server demands an API key, or another one (--api-key-file, {ENVIRONMENT})", status)


class UnavailableError(ServerError):
    pass


def server_error(message: str, status: str) -> ServerError:
    """For an error that Triton answered."""
    if RESTRICTED in message:
        return KeyRefusedError(status)
    return (UnavailableError if NOT_NOW.match(message) else ServerError)(one_line(message), status)


def not_from_triton(status: str, way: str, text: str) -> ServerError:
    """For an answer that is not Triton's: that of a proxy, or of another web server."""
    return ServerError(f"HTTP {status} from {way}, not an answer of Triton: {text[:200]!r}", status)


def one_line(text: str) -> str:
    return " ".join(text.split())


def reason(error: BaseException) -> str:
    """The operating system's words inside an error of a library, without the library's wrapping."""
    causes = list(_causes(error))
    words = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    if words:
        return words[-1]
    # http.client's error, and geventhttpclient's, which has no public name
    if isinstance(causes[-1], BadStatusLine) or type(causes[-1]).__name__ == "HTTPParseError":
        return NO_HTTP
    return one_line(str(causes[-1]))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what is inside it, outermost first, wherever requests, urllib3 and gevent keep it."""
    yield error
    inside = [getattr(error, "reason", None), *error.args, error.__cause__]
    cause = next((each for each in inside if isinstance(each, BaseException)), None)
    if cause is not None:
        yield from _causes(cause)
