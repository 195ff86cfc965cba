"""The engine's exceptions. Knows nothing of how they reach a user.

EngineError
├── ConfigError         a setting or checkpoint that stops the start
├── InvalidRequestError a field of one request is out of range; the engine goes on
├── RequestRefusedError one request is refused for what it did before
└── UnavailableError    not now: the engine is gone, not ready yet, or the server stops
"""

from __future__ import annotations

# With this every message begins that says: not now, please try again. Triton's `generate` turns all errors of a model
# into 400, so clients and proxies know them by this word.
UNAVAILABLE = "UNAVAILABLE: "


class EngineError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigError(EngineError):
    """A setting, a checkpoint file or the device keeps the engine from starting."""


class InvalidRequestError(EngineError):
    """One request's field is refused: the message names the field, the value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} is {value}, allowed: {allowed}")
        self.field = field

    def in_row(self, row: int) -> InvalidRequestError:
        """The same error, naming the row of a request of several."""
        self.args = (f"row {row}: {self}",)
        return self


# Words for the metrics: why a request is refused that may be right.
REFUSAL_REASONS = ("engine_down", "draining", "queue_full", "timeout", "deadly")


class RequestRefusedError(EngineError):
    """One request is refused though each of its fields is in range."""


class UnavailableError(EngineError):
    """No engine can take or finish the request now; `reason` is a word for the metrics, of REFUSAL_REASONS."""

    def __init__(self, message: str, reason: str = "engine_down") -> None:
        super().__init__(message)
        self.reason = reason
