"""What can become of a request, and a count of it for each kind: every one that was sent ends in one of these.

Knows how Triton's answers and errors look, not how they are sent.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from gptj_triton.client.events import EventReader
from gptj_triton.errors import UNAVAILABLE

STUB_IS_DEAD = "is not healthy"  # Triton's own, from a stub's end until it is replaced
# Triton's own too, as INTERNAL or 500, for tensors for which a region has no room; it does not reach a model.
NO_ROOM = "Failed to increase the shared memory pool size"
NOBODY = (502, 503, 504)  # a proxy's words for a server that is not there or does not answer; 503 is a server's too
# Triton's own JSON parser answers 500 to what is a client's mistake. It reads a key up to a NUL, and then does not find
# it. Source: triton common, include/triton/common/triton_json.h; server, src/http_server.cc
PARSER = re.compile(
    r"failed to parse the request JSON|attempt to |Unable to parse |Expected JSON object for keyword"
    r"|parameter key '.*' was not found in the JSON",
    re.DOTALL,
)


class Outcome(Enum):
    """How a request ended."""

    ANSWERED = "answered"
    REFUSED = "refused"  # the request is wrong
    UNAVAILABLE = "unavailable"  # the server cannot take it now, and says so
    FAILED = "failed"  # a fault of the server: 500 or INTERNAL
    CUT = "cut"  # the connection ended, or could not be made, before the last part of the answer
    HUNG = "hung"  # nothing came for as long as the client waited
    MALFORMED = "malformed"  # an answer that is not what the protocol says
    LEFT = "left"  # the client went away, as it meant to


@dataclass(frozen=True)
class Ended:
    """The end of one request: how, in which words, `seconds` after it was sent. `answer` is the last part of an answer;
    of a stream, and of what came of one that was cut, it has all of the text."""

    outcome: Outcome
    words: str = ""
    seconds: float = 0.0
    answer: Mapping[str, Any] = field(default_factory=dict)
    begun: bool = False  # a part of a stream had come
    retry_after: float = 0.0  # seconds, where the server says so

    @property
    def is_not_served(self) -> bool:
        """Whether the request is right as far as one knows, and has no whole answer."""
        return self.outcome in (Outcome.UNAVAILABLE, Outcome.CUT)

    @property
    def may_retry(self) -> bool:
        """Whether a client may send the request again: it is not served, and nothing of its answer has come."""
        return self.is_not_served and not self.begun

    def __str__(self) -> str:
        return f"{self.outcome.value} {self.words}".strip()


class Ledger:
    """Counts requests by kind: sent, and ended by outcome. For one thread."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.ended: dict[str, Counter[Outcome]] = {}
        self.words: Counter[str] = Counter()  # of what was neither answered nor left

    def note(self, kind: str, ended: Ended) -> None:
        self.ended.setdefault(kind, Counter())[ended.outcome] += 1
        if ended.outcome not in (Outcome.ANSWERED, Outcome.LEFT):
            self.words[f"{ended.outcome.value}: {re.sub(r'[0-9]+', 'N', ended.words)[:160]}"] += 1

    def count(self, *outcomes: Outcome, kinds: str = "") -> int:
        """How many requests ended so, of kinds whose name begins with `kinds`."""
        return sum(
            ended[outcome] for kind, ended in self.ended.items() if kind.startswith(kinds) for outcome in outcomes
        )

    @property
    def all_sent(self) -> int:
        return sum(self.sent.values())

    @property
    def missing(self) -> int:
        """Requests that have no end."""
        return self.all_sent - self.count(*Outcome)

    def table(self) -> str:
        """A line for each kind."""
        used = [outcome for outcome in Outcome if self.count(outcome)]
        lines = [f"{'request':<22} {'sent':>7} " + " ".join(f"{outcome.value:>11}" for outcome in used)]
        for kind in sorted(self.sent):
            ended = self.ended.get(kind, Counter())
            lines.append(f"{kind:<22} {self.sent[kind]:>7} " + " ".join(f"{ended[each]:>11}" for each in used))
        lines.append(
            f"{'together':<22} {self.all_sent:>7} " + " ".join(f"{self.count(outcome):>11}" for outcome in used)
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, dict[str, int]]:
        return {
            kind: {"sent": self.sent[kind]} | {each.value: n for each, n in self.ended.get(kind, Counter()).items()}
            for kind in sorted(self.sent)
        }


def of_http(status: int, body: bytes) -> Ended:
    """The end of a request whose whole answer has come."""
    if status == 200 and body.startswith(b"data:"):
        stream = StreamEnd(status)
        stream.feed(body)
        return stream.ended()
    try:
        # Triton's own errors repeat a name of the request as it came, which need not be UTF-8.
        answer = json.loads(body.removeprefix(b"data:").decode(errors="strict" if status == 200 else "replace"))
    except ValueError:
        return Ended(Outcome.MALFORMED, f"{status} {body[:200]!r}")
    if not isinstance(answer, dict):
        return Ended(Outcome.MALFORMED, f"{status} {body[:200]!r}")
    if status == 200 and "error" not in answer:
        return Ended(Outcome.ANSWERED, answer=answer)
    if not isinstance(answer.get("error"), str):
        return Ended(Outcome.MALFORMED, f"{status} {body[:200]!r}")
    return of_error(status, answer["error"])


def of_error(status: int, message: str) -> Ended:
    """The end of a request by an error of HTTP, or one inside a stream (status 200)."""
    words = f"{status} {message}"
    if UNAVAILABLE in message or STUB_IS_DEAD in message or status in NOBODY:
        return Ended(Outcome.UNAVAILABLE, words)
    if status >= 500 and status != 501 and NO_ROOM not in message and not PARSER.search(message):
        return Ended(Outcome.FAILED, words)
    return Ended(Outcome.REFUSED, words)


class StreamEnd:
    """Takes the bytes of a stream of events as they come; `ended` is what they amount to when no more come."""

    def __init__(self, status: int) -> None:
        self.events = 0
        self._status, self._reader = status, EventReader()
        self._last: dict[str, Any] = {}
        self._text = ""
        self._broken: str | None = None
        self._plain = b""

    def feed(self, chunk: bytes) -> None:
        if self._status != 200:
            self._plain += chunk
            return
        try:
            for event in self._reader.feed(chunk):
                self.events += 1
                self._last = event
                self._text += str(event.get("text_output", ""))
        except ValueError as error:
            self._broken = str(error)

    def ended(self) -> Ended:
        if self._status != 200:
            return of_http(self._status, self._plain)
        if self._broken or self._reader.rest.strip():
            return Ended(Outcome.MALFORMED, self._broken or repr(self._reader.rest[:200]), begun=self._begun)
        if "error" in self._last:
            return replace(of_error(200, str(self._last["error"])), answer=self._answer, begun=self._begun)
        if not self._last.get("finish_reason"):
            return self.cut("a stream without its last event")
        return Ended(Outcome.ANSWERED, answer=self._answer, begun=self._begun)

    def cut(self, words: str) -> Ended:
        """The end where the connection ended first."""
        return Ended(Outcome.CUT, words, answer=self._answer, begun=self._begun)

    @property
    def _begun(self) -> bool:
        return self.events > ("error" in self._last)

    @property
    def _answer(self) -> dict[str, Any]:
        return {**self._last, "text_output": self._text}


def of_grpc(status: str, message: str) -> Ended:
    """The end of a request by an error of gRPC, whose `status` is `StatusCode.NAME`."""
    name = status.removeprefix("StatusCode.")
    words = f"{name} {message}"
    connection = ("Socket closed", "failed to connect", "Connection reset", "Broken pipe", "GOAWAY", "tcp handshaker")
    if UNAVAILABLE in message or STUB_IS_DEAD in message:
        return Ended(Outcome.UNAVAILABLE, words)
    if name == "UNAVAILABLE":
        lost = any(each.lower() in message.lower() for each in connection)
        return Ended(Outcome.CUT if lost else Outcome.UNAVAILABLE, words)
    if NO_ROOM in message:
        return Ended(Outcome.REFUSED, words)
    if name in ("INTERNAL", "UNKNOWN", "DATA_LOSS", "ABORTED"):
        return Ended(Outcome.FAILED, words)
    if name == "DEADLINE_EXCEEDED":
        return Ended(Outcome.HUNG, words)
    return Ended(Outcome.REFUSED, words)
