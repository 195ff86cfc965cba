"""What a client raises, and how the words of other libraries' errors are shortened."""

from __future__ import annotations

import re


class ClientError(Exception):
    """What can go wrong, in one line each.

    ClientError
    ├── InvalidFieldError      refused before sending: unknown name, or a value that its type cannot carry
    ├── ConnectionFailedError  no server at the URL, or the connection broke
    ├── NoAnswerInTimeError    the timeout passed
    └── ServerError            the server answered with an error; `status` is its HTTP or gRPC status, "" if a
                               stream gives none
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


def one_line(text: str) -> str:
    return " ".join(text.split())


def reason(error: Exception) -> str:
    """The operating system's words inside an error of a library, without the library's wrapping."""
    words = re.findall(r"\[Errno -?\d+\] ([\w ]+)", str(error))
    return words[-1] if words else one_line(str(error))
