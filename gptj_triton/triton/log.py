"""What a stub writes to Triton's log, and the errors that clients get: each kind is made in one place.

A line about a request begins with `[request id: ID]`, as Triton's own do, and then names the model. No line at the
default level has text of a request, and no error that a client gets has a path or a word of an exception: those stand
in the log.
"""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from typing import Any

import triton_python_backend_utils as pb_utils

from gptj_triton.errors import UNAVAILABLE

LONGEST_ID = 64  # of a client's id, in a line of the log
LINES_A_SECOND = 50  # about requests, so that a flood of bad ones does not become one of lines

log = logging.getLogger("gptj_triton")


class TritonHandler(logging.Handler):
    """Hands records to Triton's log. Triton writes those of level DEBUG from --log-verbose=1 on."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; the traceback of an exception is part of its line."""
        writers = {logging.DEBUG: "log_verbose", logging.INFO: "log_info", logging.WARNING: "log_warn"}
        request = f"[request id: {record.request}] " if hasattr(record, "request") else ""
        write = getattr(pb_utils.Logger, writers.get(record.levelno, "log_error"))
        write(f"{request}{self._model}: {self.format(record)}")


class RequestLimiter(logging.Filter):
    """Lets through so many lines about requests in a second; the next one then says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._second = 0
        self._lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written; lines that are not about a request always are."""
        if not hasattr(record, "request"):
            return True
        second = int(time.monotonic())
        if second != self._second:
            if self._lines > LINES_A_SECOND:
                record.msg += f" ({self._lines - LINES_A_SECOND} lines about other requests were left out)"
            self._second, self._lines = second, 0
        self._lines += 1
        return self._lines <= LINES_A_SECOND


def log_to_triton(model: str) -> None:
    """From now on, the log of this process, which runs `model`, is Triton's."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.handlers = [TritonHandler(model)]
    log.filters = [RequestLimiter()]


def id_of(request: Any) -> str:
    """The id that the client gave the request, fit for a line of a log, or a new one."""
    given = str(request.request_id())
    return ascii(given[:LONGEST_ID])[1:-1].replace("]", r"\x5d") if given else secrets.token_hex(8)


def about(request_id: str, level: int, message: str) -> None:
    """Write a line about a request."""
    log.log(level, "%s", message, extra={"request": request_id})


def refused(request_id: str, message: str) -> Any:
    """The error for a request that cannot be served as it is."""
    about(request_id, logging.DEBUG, f"refused: {message}")
    return pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)


def failed(request_id: str, error: Exception) -> Any:
    """The error for a request that a fault of the server keeps from being served. The log has where that was; what the
    exception says, which may have text of the request, is there from --log-verbose=1 on.
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    about(request_id, logging.ERROR, f"failed by {type(error).__name__}\n{frames}")
    about(request_id, logging.DEBUG, repr(error))
    return pb_utils.TritonError(
        f"a fault of the server; its log has more (request id: {request_id})", pb_utils.TritonError.INTERNAL
    )


def unavailable(request_id: str, message: str) -> Any:
    """The error for a request that could be served at another time."""
    about(request_id, logging.WARNING, f"not served: {message}")
    return pb_utils.TritonError(f"{UNAVAILABLE}{message}", pb_utils.TritonError.UNAVAILABLE)
