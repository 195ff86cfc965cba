"""Sends the engine's answers as they come, and streams in pieces at a pace. Knows no Triton and no sockets.

One thread sends everything, so a response is never sent, or a request asked about, after its last response. Pieces of a
stream keep a gap that grows with the number of streams, because the server queues what a slow reader does not read;
tokens that come in between travel together in the next piece.

The engine ends a request whose time is over. Where it does not, because it stands still or a step takes long, the
request is ended here with what has come of it.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

from gptj_triton.engine.metrics import FINISH_REASONS, RequestMetrics
from gptj_triton.errors import ConfigError, RequestRefusedError, UnavailableError
from gptj_triton.process.client import Answer, EngineClient, Failed
from gptj_triton.process.messages import ClientRequest, Finished, Result, TokenDelta
from gptj_triton.triton.output_tensors import PieceTensors, passed_through, write_tensors
from gptj_triton.triton.request_size import Tensors
from gptj_triton.triton.tensors import Row

Outputs: TypeAlias = dict[str, NDArray[Any]]

PIECES_PER_SECOND = 1000.0
HANDLE_INTERVAL = 0.12  # seconds between two pieces of a stream that say how to cancel it
CANCEL_CHECK_AGE = 0.5  # seconds after which a request is first asked whether its client left
ROUND_INTERVAL = 0.1  # seconds between two rounds of asking
CANCEL_CHECKS_A_ROUND = 50  # one takes 0.1 ms
TIMEOUT_GRACE = 0.2  # seconds within which the engine's own answer comes

log = logging.getLogger("gptj_triton")


def read_pace(text: str) -> float:
    """The parameter `stream_pieces_per_second`; ConfigError for what is no number above 0."""
    try:
        pace = float(text or PIECES_PER_SECOND)
    except ValueError:
        pace = math.nan
    if not 0 < pace < math.inf:
        raise ConfigError(f"parameter stream_pieces_per_second is {text!r}, allowed: a number above 0")
    return pace


class Responder(Protocol):
    """Where the responses to one request go."""

    def send(self, outputs: Outputs, last: bool) -> None: ...

    def fail(self, message: str) -> None:
        """Say as the last response that no engine can take or finish the request now."""

    def fail_by(self, error: Exception) -> None:
        """Say as the last response that a fault of the server, `error`, ended the request."""

    def refuse(self, message: str) -> None:
        """Send an error of the request as the last response."""

    def is_cancelled(self) -> bool:
        """Whether the client left, as far as the server knows. Not to be called after the last response."""


class Reply:
    """The response to one request, sent when all of its sequences have been answered."""

    def __init__(self, tensors: Tensors, rows: list[Row], responder: Responder, pass_through: bool = False) -> None:
        self.responder = responder
        self.deadline = math.inf  # when it is to end, whatever the engine does
        self.numbers: list[int] = []  # the engine's, one a sequence
        self.failed: Failed | None = None
        self.began = time.monotonic()
        self.sent_last = False
        self.cancelled = False
        self._tensors = tensors
        self._rows = rows
        self._pass_through = pass_through
        self._missing = sum(len(row.sequences) for row in rows)
        self._answers: list[Finished | None] = [None] * self._missing
        self._tokens: list[list[int]] = [[] for _ in self._answers]  # of those that were not answered in time
        self._log_probs: list[list[float]] = [[] for _ in self._answers]

    def take(self, index: int, answer: Answer) -> bool:
        """The answer to one sequence; true if the last response can be sent now."""
        if isinstance(answer, Failed):
            self.failed = self.failed or answer
        else:
            self._answers[index] = answer
        self._missing -= 1
        return not self._missing or self.failed is not None

    def take_tokens(self, delta: TokenDelta, index: int) -> bool:
        """New tokens of one sequence, which may be the last that are heard of; true if a piece can be sent now."""
        self._tokens[index] += delta.tokens
        self._log_probs[index] += delta.log_probs
        return False

    @property
    def finish_reason(self) -> str:
        """Why the request ended: of its sequences' reasons the one that stands first in FINISH_REASONS."""
        reasons = {answer.results[0].finish_reason if answer else "timeout" for answer in self._answers}
        return min(reasons, key=FINISH_REASONS.index)

    def outputs_so_far(self, reason: str) -> Outputs:
        """The tensors of the last response when its time is over: with `reason` for what is not answered."""
        params = [params for row in self._rows for params in row.sequences]
        answers = [
            answer or Finished(0, [Result(tokens[:], reason, log_probs[:])] * each.beam_width)
            for answer, tokens, log_probs, each in zip(
                self._answers, self._tokens, self._log_probs, params, strict=True
            )
        ]
        return self._write(answers)

    def outputs(self) -> Outputs:
        """The tensors of the last response, once all sequences are answered."""
        return self._write([answer for answer in self._answers if answer])

    def _write(self, answers: list[Finished]) -> Outputs:
        outputs = write_tensors(self._tensors, self._rows, answers)
        return outputs | passed_through(self._tensors, self._rows) if self._pass_through else outputs


class StreamReply(Reply):
    """The responses to one request that is streamed. Tokens come on one thread, pieces are sent on another."""

    def __init__(self, tensors: Tensors, rows: list[Row], responder: Responder) -> None:
        super().__init__(tensors, rows, responder)
        self.next_piece = 0.0  # when it may be sent
        self.next_handle = math.inf  # until all sequences have their numbers
        self._pieces = PieceTensors(tensors, rows)
        self._lock = threading.Lock()
        self._waiting = False  # tokens that no piece has carried

    def take_tokens(self, delta: TokenDelta, index: int) -> bool:
        """New tokens of one sequence; true if they are the first to wait for the next piece."""
        with self._lock:
            self._pieces.add(index, delta.tokens, delta.log_probs)
            first, self._waiting = not self._waiting, True
        return first

    def take(self, index: int, answer: Answer) -> bool:
        with self._lock:
            if isinstance(answer, Finished):
                self._pieces.end(index, answer.results[0])
            return super().take(index, answer)

    def piece(self, cancel_handles: list[bytes]) -> Outputs | None:
        """The tensors of the next piece; None when all is answered, for then the last one brings the rest."""
        with self._lock:
            if not self._missing:
                return None
            self._waiting = False
            return self._pieces.piece(last=False, cancel_handles=cancel_handles)

    def outputs(self) -> Outputs:
        with self._lock:
            return self._pieces.piece(last=True)

    def outputs_so_far(self, reason: str) -> Outputs:
        with self._lock:
            for index, answer in enumerate(self._answers):
                if answer is None:
                    self._pieces.end(index, Result([], reason, []))
            return self._pieces.piece(last=True)


class Replies:
    """All replies in flight, and the thread that sends them."""

    def __init__(self, engine: EngineClient, pieces_per_second: float, count: Callable[[RequestMetrics], None]) -> None:
        """`count` is told how each request ended."""
        self._engine = engine
        self._count = count
        self._pieces_per_second = pieces_per_second
        # Filled by the threads that submit, emptied by the thread that sends.
        self._open: dict[Reply, None] = {}  # the one asked about longest ago comes first
        self._open_streams: set[Reply] = set()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._later: list[tuple[float, int, Callable[[], None]]] = []  # a heap; the number decides between equal times
        self._numbers = itertools.count()
        self._clients = itertools.count()
        self._at(0.0, self._make_round)
        self._thread = threading.Thread(target=self._run, name="replies", daemon=True)
        self._thread.start()

    def submit(self, reply: Reply, rows: list[Row], timeout: float) -> None:
        """Send all sequences to the engine; `reply` is sent as it gets answers. Whatever goes wrong becomes an answer:
        an exception would leave the rest of Triton's batch without any."""
        if timeout:
            reply.deadline = time.monotonic() + timeout + TIMEOUT_GRACE
        self._open[reply] = None
        try:
            self._submit_sequences(reply, rows, timeout)
        except Exception as error:
            self._tasks.put(functools.partial(self._fail, reply, error))

    def _submit_sequences(self, reply: Reply, rows: list[Row], timeout: float) -> None:
        streamed = isinstance(reply, StreamReply)
        if isinstance(reply, StreamReply):
            self._open_streams.add(reply)
        sequences = [(row.prompt, params) for row in rows for params in row.sequences]
        num_tokens = sum(params.most_tokens(len(prompt)) for prompt, params in sequences)
        client = ClientRequest(next(self._clients), num_tokens)
        for index, (prompt, params) in enumerate(sequences):
            on_answer = functools.partial(self._take, reply, index)
            on_tokens = functools.partial(self._take_tokens, reply, index)
            try:
                number = self._engine.submit(prompt, params, on_answer, on_tokens, streamed, timeout, client)
            except UnavailableError as error:
                self._take(reply, index, Failed(str(error), refused=error.reason))
                return
            except RequestRefusedError as error:
                self._take(reply, index, Failed(str(error), invalid=True, refused="deadly"))
                return
            reply.numbers.append(number)
            if reply.sent_last:  # it failed meanwhile, and nobody waits for this sequence or the rest
                self._engine.cancel(number)
                return
        if isinstance(reply, StreamReply):
            reply.next_handle = time.monotonic() + HANDLE_INTERVAL

    def close(self) -> None:
        """Return when all that has been answered is sent. The engine must have been left."""
        self._tasks.put(None)
        self._thread.join()

    def _take(self, reply: Reply, index: int, answer: Answer) -> None:
        if reply.take(index, answer):
            self._tasks.put(functools.partial(self._send_last, reply))

    def _take_tokens(self, reply: Reply, index: int, delta: TokenDelta) -> None:
        if reply.take_tokens(delta, index):
            assert isinstance(reply, StreamReply)
            self._tasks.put(functools.partial(self._pace, reply))

    def _run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=max(0.0, self._later[0][0] - time.monotonic()))
            except queue.Empty:
                pass
            else:
                if task is None:
                    return
                self._do(task)
                del task  # a request that is kept keeps its model loaded
            while self._later and self._later[0][0] <= time.monotonic():
                self._do(heapq.heappop(self._later)[2])

    def _do(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception:  # this thread answers all other requests, too
            log.exception("a response could not be sent")

    def _at(self, moment: float, task: Callable[[], None]) -> None:
        heapq.heappush(self._later, (moment, next(self._numbers), task))

    def _pace(self, reply: StreamReply) -> None:
        if reply.next_piece <= time.monotonic():
            self._send_piece(reply)
        else:
            self._at(reply.next_piece, functools.partial(self._send_piece, reply))

    def _send_piece(self, reply: StreamReply) -> None:
        if reply.sent_last:
            return
        now = time.monotonic()
        reply.next_piece = now + len(self._open_streams) / self._pieces_per_second
        handles = []
        if reply.next_handle <= now:
            reply.next_handle = now + HANDLE_INTERVAL
            handles = [self._engine.cancel_handle(number) for number in reply.numbers]
        self._respond(reply, lambda: reply.piece(handles), last=False)

    def _send_last(self, reply: Reply) -> None:
        if reply.sent_last:
            return
        if reply.failed is not None:
            self._abandon(reply, reply.failed.refused)
            if reply.failed.invalid:
                reply.responder.refuse(reply.failed.message)
            else:
                reply.responder.fail(reply.failed.message)
        else:
            self._respond(reply, reply.outputs, last=True)

    def _respond(self, reply: Reply, outputs: Callable[[], Outputs | None], last: bool) -> None:
        try:
            tensors = outputs()
            if tensors is not None:
                reply.responder.send(tensors, last)
        except Exception as error:
            self._fail(reply, error)
        else:
            if last:
                self._finish(reply)
                self._count(RequestMetrics(request_success_total={reply.finish_reason: 1}))

    def _fail(self, reply: Reply, error: Exception) -> None:
        """End a reply by a fault of ours, unless it has ended."""
        if not reply.sent_last:
            self._abandon(reply)
            reply.responder.fail_by(error)

    def _abandon(self, reply: Reply, refused: str = "") -> None:
        """End a reply that becomes an error; nobody waits for what is still in flight of it. `refused` is the reason
        where it was not begun.
        """
        self._finish(reply)
        if refused:
            self._count(RequestMetrics(request_refused_total={refused: 1}))
        else:
            self._count(RequestMetrics(request_failed_total=1))
        self._cancel(reply)

    def _finish(self, reply: Reply) -> None:
        reply.sent_last = True
        self._open.pop(reply)
        self._open_streams.discard(reply)

    def _make_round(self) -> None:
        """End what is overdue, and cancel the requests of clients that left."""
        now = time.monotonic()
        self._at(now + ROUND_INTERVAL, self._make_round)
        for reply in [reply for reply in list(self._open) if reply.deadline <= now]:
            self._respond(reply, functools.partial(reply.outputs_so_far, "timeout"), last=True)
            self._cancel(reply)
        old = (reply for reply in list(self._open) if now - reply.began >= CANCEL_CHECK_AGE and not reply.cancelled)
        for reply in list(itertools.islice(old, CANCEL_CHECKS_A_ROUND)):
            self._open[reply] = self._open.pop(reply)
            if reply.responder.is_cancelled():
                self._cancel(reply)

    def _cancel(self, reply: Reply) -> None:
        reply.cancelled = True
        for number in reply.numbers:
            self._engine.cancel(number)
