"""What the engine process knows of a frontend and of its requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq

from gptj_triton.engine.sequence import Request, Sequence
from gptj_triton.process import messages


@dataclass(eq=False)
class Stream:
    """A streamed request: its sequence, and how many of its tokens have been sent."""

    sequence: Sequence
    num_sent: int = 0

    def take_delta(self) -> messages.TokenDelta | None:
        """The tokens that have not been sent yet, None if there are none; from now on they count as sent."""
        start, self.num_sent = self.num_sent, len(self.sequence.output)
        if start == self.num_sent:
            return None
        _, request = address_of(self.sequence)
        log_probs = self.sequence.log_probs[start:] if self.sequence.params.is_return_log_probs else []
        return messages.TokenDelta(request, self.sequence.output[start:], log_probs)


@dataclass(eq=False)
class Frontend:
    """A process that sends requests: where to answer, how to see that it died, and its requests in flight.

    `model` is the name by which it publishes metrics. `client` is the number of the client's request that came last,
    `asked` what the engine knows of it, and `refusal` why it was refused.
    """

    model: str
    outbox: zmq.Socket[bytes]
    pidfd: int
    requests: set[int] = field(default_factory=set)
    streams: dict[int, Stream] = field(default_factory=dict)
    client: int | None = None
    asked: Request = field(default_factory=Request)
    refusal: str | None = None


def address_of(sequence: Sequence) -> tuple[str, int]:
    """The frontend and the number of the request that a sequence belongs to."""
    assert isinstance(sequence.key, tuple)
    frontend, request = sequence.key
    return frontend, request


def result_of(sequence: Sequence) -> messages.Result:
    assert sequence.finish_reason is not None
    log_probs = sequence.log_probs if sequence.params.is_return_log_probs else []
    return messages.Result(sequence.output, sequence.finish_reason, log_probs)
