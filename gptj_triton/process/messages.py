"""What an engine process and its doors say to each other, as MessagePack. Plain data, no behaviour.

A door is a process that takes requests from users; `request` is a number that the door chose and that is unique within
it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from gptj_triton.engine.sampling_params import Limits, SamplingParams


class Hello(msgspec.Struct, tag="hello"):
    """A door joins; the engine connects to its `address` (a ZeroMQ endpoint) and watches its process."""

    door: str
    pid: int
    address: str


class Submit(msgspec.Struct, tag="submit"):
    """Continue `prompt` (token ids) for at most `timeout` seconds, 0 for as long as it takes.

    With `stream`, which beams have not, its tokens are told as they come; the answer holds them all nevertheless.
    """

    door: str
    request: int
    prompt: list[int]
    params: SamplingParams
    stream: bool = False
    timeout: float = 0.0


class Cancel(msgspec.Struct, tag="cancel"):
    """Stop generating for a request; it is answered with what there is and finish reason "cancelled"."""

    door: str
    request: int


class Goodbye(msgspec.Struct, tag="goodbye"):
    """A door leaves; the engine ends after its last one."""

    door: str


class Welcome(msgspec.Struct, tag="welcome"):
    """The engine can be used; what a door must know of the model."""

    engine_pid: int
    limits: Limits
    start_id: int
    end_id: int


class Result(msgspec.Struct):
    """One continuation: new token ids, why it ended, and the log-probability of each token if asked for."""

    tokens: list[int]
    finish_reason: str
    log_probs: list[float]


class NewTokens(msgspec.Struct, array_like=True):
    """Token ids that a streamed request got since it was told of last, with their log-probabilities if asked for."""

    request: int
    tokens: list[int]
    log_probs: list[float]


class Progress(msgspec.Struct, tag="progress"):
    """What a step brought to all streamed requests of a door that go on."""

    requests: list[NewTokens]


class Load(msgspec.Struct, tag="load"):
    """How busy the engine is: sequences of all doors, and pages of the KV cache."""

    running: int
    waiting: int
    used_pages: int
    pages: int


class Finished(msgspec.Struct, tag="finished"):
    """The one answer to a request: its continuations, best first; several after a beam search only."""

    request: int
    results: list[Result]


class Refused(msgspec.Struct, tag="refused"):
    """The one answer to a request that cannot be carried out: `invalid` if it was the request's fault, else the
    engine's.
    """

    request: int
    message: str
    invalid: bool


ToEngine: TypeAlias = Hello | Submit | Cancel | Goodbye
ToDoor: TypeAlias = Welcome | Progress | Load | Finished | Refused
