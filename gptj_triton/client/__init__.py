"""Asks the server for text, whole or as it comes: `Client("localhost:8000").generate("Once upon a time").text`."""

from gptj_triton.client.address import host_and_port
from gptj_triton.client.answer import Answer
from gptj_triton.client.client import DEFAULT_URLS, Client
from gptj_triton.client.errors import (
    ClientError,
    ConnectionFailedError,
    InvalidFieldError,
    KeyRefusedError,
    NoAnswerInTimeError,
    ServerError,
    UnavailableError,
)
from gptj_triton.client.request import MODEL, STREAMING_MODEL

__all__ = [
    "DEFAULT_URLS",
    "MODEL",
    "STREAMING_MODEL",
    "Answer",
    "Client",
    "ClientError",
    "ConnectionFailedError",
    "InvalidFieldError",
    "KeyRefusedError",
    "NoAnswerInTimeError",
    "ServerError",
    "UnavailableError",
    "host_and_port",
]
