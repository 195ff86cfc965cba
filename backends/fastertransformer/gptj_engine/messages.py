"""What an engine process and its doors say to each other, as MessagePack. Plain data, no behaviour.

A door is a process that takes requests from users; `request` is a number that the door chose and that is unique within
it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from gptj_engine.sampling_params import Limits, SamplingParams


class Hello(msgspec.Struct, tag="hello"):
    """A door joins; the engine connects to its `address` (a ZeroMQ endpoint) and watches its process."""

    door: str
    pid: int
    address: str


class Submit(msgspec.Struct, tag="submit"):
    """Continue `prompt` (token ids)."""

    door: str
    request: int
    prompt: list[int]
    params: SamplingParams


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
ToDoor: TypeAlias = Welcome | Finished | Refused
