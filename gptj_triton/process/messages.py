"""The messages between an engine process and its frontends, as MessagePack. Plain data, no behaviour.

A frontend is a process that takes requests from users. `request` is a number that the frontend chose, unique
within that frontend.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from gptj_triton.engine.metrics import EngineMetrics
from gptj_triton.engine.sampling_params import Limits, SamplingParams


class Hello(msgspec.Struct, tag="hello"):
    """A frontend joins; the engine connects to its `address` (a ZeroMQ endpoint) and watches its process and its
    server's. `model` is the name by which it publishes the engine's metrics.
    """

    frontend: str
    model: str
    pid: int
    server_pid: int
    address: str


class Submit(msgspec.Struct, tag="submit"):
    """Continue `prompt` (token ids) for at most `timeout` seconds, 0 for as long as it takes.

    `submitted_at` is the moment of time.monotonic() from which its times are measured.

    With `stream`, which beam search does not have, its tokens are sent as they come; the answer holds all of them too.
    In the last seconds before its timeout any request is streamed.
    """

    frontend: str
    request: int
    prompt: list[int]
    params: SamplingParams
    submitted_at: float
    stream: bool = False
    timeout: float = 0.0


class Cancel(msgspec.Struct, tag="cancel"):
    """Stop generating for a request; it is answered with what there is and finish reason "cancelled"."""

    frontend: str
    request: int


class Goodbye(msgspec.Struct, tag="goodbye"):
    """A frontend leaves; the engine ends after its last one."""

    frontend: str


class Drain(msgspec.Struct, tag="drain"):
    """The server is about to stop: take no more requests, and answer those there are with an error after `seconds`.

    When none is left the engine writes the file `drained`, JSON {"cut": how many got the error}, and goes on without
    work. A second such message can only shorten the time.
    """

    seconds: float


class Welcome(msgspec.Struct, tag="welcome"):
    """The engine can be used; what a frontend must know of the model."""

    engine_pid: int
    limits: Limits
    start_id: int
    end_ids: tuple[int, ...]


class Result(msgspec.Struct):
    """One continuation: new token ids, why it ended, and the log-probability of each token if asked for."""

    tokens: list[int]
    finish_reason: str
    log_probs: list[float]


class TokenDelta(msgspec.Struct, array_like=True):
    """The token ids that a streamed request got since its last delta, with their log-probabilities if asked for."""

    request: int
    tokens: list[int]
    log_probs: list[float]


class Deltas(msgspec.Struct, tag="deltas"):
    """What a step gave to the streamed requests of a frontend that go on."""

    deltas: list[TokenDelta]


class Finished(msgspec.Struct, tag="finished"):
    """The one answer to a request: its continuations, best first; several after a beam search only."""

    request: int
    results: list[Result]


class Refused(msgspec.Struct, tag="refused"):
    """The one answer to a request that the engine does not finish; `message` says why, for users.

    The server cannot serve it now, or with `invalid` never: another could not either. `reason` is a word for the
    metrics, where it was not begun: "invalid" or one of REFUSAL_REASONS.
    """

    request: int
    message: str
    invalid: bool = False
    reason: str = ""


class Draining(msgspec.Struct, tag="draining"):
    """The engine takes no more requests, and answers those it has within `seconds`."""

    seconds: float


class Report(msgspec.Struct, tag="report"):
    """What the engine counted since its last report. `publisher` is the one frontend that publishes it."""

    publisher: str
    metrics: EngineMetrics


ToEngine: TypeAlias = Hello | Submit | Cancel | Goodbye | Drain
ToFrontend: TypeAlias = Welcome | Deltas | Report | Finished | Refused | Draining
