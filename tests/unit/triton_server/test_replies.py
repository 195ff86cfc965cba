"""When a reply is sent, and what becomes of it when its client or the engine goes: the test puts tokens in and takes
responses out."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest

from gptj_triton.engine.metrics import RequestMetrics
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import ConfigError, UnavailableError
from gptj_triton.process.client import EngineClient, Failed
from gptj_triton.process.messages import Finished, Result, TokenDelta
from gptj_triton.triton.replies import (
    CANCEL_CHECK_AGE,
    HANDLE_INTERVAL,
    Outputs,
    Replies,
    Reply,
    StreamReply,
    read_pace,
)
from gptj_triton.triton.tensors import Row

TENSORS = {"input_ids": np.array([[1, 2]], np.uint32)}
PACE = 10.0  # pieces a second, so slow that a busy machine does not blur which piece has waited


class Engine:
    """Takes requests as EngineClient does; the test answers them."""

    def __init__(self) -> None:
        self.requests: list[tuple[Callable[[Any], None], Callable[[TokenDelta], None]]] = []
        self.cancelled: list[int] = []
        self.available = True
        self.breaks_at: int | None = None  # the number of a request that cannot be handed over

    def submit(self, prompt: list[int], params: SamplingParams, on_answer: Any, on_tokens: Any, *how: Any) -> int:
        if not self.available:
            raise UnavailableError("no engine")
        if self.breaks_at == len(self.requests):
            raise OSError("no file descriptor left")
        self.requests.append((on_answer, on_tokens))
        return len(self.requests) - 1

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def cancel_handle(self, number: int) -> bytes:
        return b"handle %d" % number

    def add(self, number: int, *tokens: int) -> None:
        self.requests[number][1](TokenDelta(number, list(tokens), []))

    def end(self, number: int, *tokens: int, reason: str = "length") -> None:
        self.requests[number][0](Finished(number, [Result(list(tokens), reason, [])]))

    def refuse(self, number: int, message: str) -> None:
        self.requests[number][0](Failed(message))


class Client:
    """Where responses go: (seconds since it began, outputs or the error, whether it is the last)."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.responses: queue.Queue[tuple[float, Outputs | str, bool]] = queue.Queue()
        self.left = False
        self.ended = False
        self.asked_after_the_end = False
        self.breaks = False
        self.hold: threading.Event | None = None  # what is sent waits for it
        self.sending = threading.Event()

    def send(self, outputs: Outputs, last: bool) -> None:
        self.sending.set()
        if self.hold:
            assert self.hold.wait(10)
        if self.breaks:
            raise OSError("no shared memory")
        assert not self.ended
        copied = {name: array.copy() for name, array in outputs.items()}
        self.ended = last
        self.responses.put((time.monotonic() - self.began, copied, last))

    def fail_by(self, error: Exception) -> None:
        self.fail(f"fault: {error}")

    def fail(self, message: str) -> None:
        assert not self.ended
        self.ended = True
        self.responses.put((time.monotonic() - self.began, message, True))

    def refuse(self, message: str) -> None:
        self.fail(f"refused: {message}")

    def is_cancelled(self) -> bool:
        self.asked_after_the_end |= self.ended
        return self.left

    def take(self) -> tuple[float, Any, bool]:
        return self.responses.get(timeout=10)

    def lengths(self) -> tuple[int, int]:
        """(previous length, length) of the next piece."""
        _, outputs, _ = self.take()
        return outputs["previous_length"].item(), outputs["sequence_length"].item()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def counted() -> RequestMetrics:
    """How the requests of `replies` ended."""
    return RequestMetrics()


@pytest.fixture
def replies(engine: Engine, counted: RequestMetrics) -> Iterator[Replies]:
    opened = Replies(cast(EngineClient, engine), PACE, counted.add)
    yield opened
    opened.close()


def begin(replies: Replies, client: Client, streamed: bool = True, copies: int = 1, timeout: float = 0.0) -> None:
    rows = [Row([1, 2], [SamplingParams(request_output_len=500, end_ids=(9,))] * copies)]
    kind = StreamReply if streamed else Reply
    replies.submit(kind(TENSORS, rows, client), rows, timeout)


def test_the_first_piece_goes_at_once_and_tokens_that_wait_travel_together(engine: Engine, replies: Replies) -> None:
    client = Client()
    others = [Client() for _ in range(19)]
    for each in (client, *others):
        begin(replies, each)
    gap = 20 / PACE
    engine.add(0, 5)
    first, outputs, last = client.take()
    assert first < gap / 2 and not last
    assert outputs["sequence_length"].item() == 3
    for token in range(10):
        engine.add(0, token)
    second, outputs, _ = client.take()
    assert second - first >= gap * 0.8
    assert (outputs["previous_length"].item(), outputs["sequence_length"].item()) == (3, 13)
    assert outputs["output_ids"].tolist() == [[[1, 2, 5, *range(10)]]]


def test_a_sequence_that_is_submitted_while_its_request_fails_is_cancelled(
    engine: Engine, replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client()
    submit = engine.submit

    def fail_meanwhile(*arguments: Any) -> int:
        number = submit(*arguments)
        if number == 1:
            engine.refuse(0, "the engine died")
            client.take()
        return number

    monkeypatch.setattr(engine, "submit", fail_meanwhile)
    begin(replies, client, copies=4)
    assert len(engine.requests) == 2
    assert engine.cancelled[-1] == 1


def test_the_gap_is_as_short_as_there_are_few_streams(engine: Engine, replies: Replies) -> None:
    client = Client()
    begin(replies, client)
    engine.add(0, 5)
    first, _, _ = client.take()
    engine.add(0, 6)
    second, _, _ = client.take()
    assert 0.5 / PACE <= second - first < 15 / PACE
    for number in range(30):
        begin(replies, Client())
        engine.end(1 + number, 7)
    engine.add(0, 6)
    assert client.lengths() == (4, 5)
    third = time.monotonic()
    engine.add(0, 6)
    client.take()
    assert time.monotonic() - third < 15 / PACE, "streams that ended still count"


def test_the_last_piece_waits_for_nothing_and_brings_the_rest(engine: Engine, replies: Replies) -> None:
    client = Client()
    for each in (client, *(Client() for _ in range(300))):
        begin(replies, each)
    engine.add(0, 5)
    assert client.lengths() == (2, 3)
    engine.add(0, 6)
    engine.end(0, 5, 6, 7, reason="stop")
    _, outputs, last = client.take()
    assert last and outputs["finish_reason"].item() == b"stop"
    assert (outputs["previous_length"].item(), outputs["sequence_length"].item()) == (3, 5)
    time.sleep(0.05)
    assert client.responses.empty()


def test_what_is_answered_before_a_piece_is_made_travels_in_the_last_one_alone(
    engine: Engine, replies: Replies
) -> None:
    client = Client()
    going = client.hold = threading.Event()
    begin(replies, client)
    engine.add(0, 5)
    assert client.sending.wait(10)
    engine.add(0, 6)
    engine.end(0, 5, 6, 7)
    time.sleep(1.5 / PACE)  # now a piece could be sent
    going.set()
    assert client.lengths() == (2, 3)
    _, outputs, last = client.take()
    assert last and (outputs["previous_length"].item(), outputs["sequence_length"].item()) == (3, 5)


def test_one_answer_is_sent_when_all_sequences_have_ended(engine: Engine, replies: Replies) -> None:
    client = Client()
    begin(replies, client, streamed=False, copies=2)
    engine.end(1, 7, 8)
    time.sleep(0.02)
    assert client.responses.empty()
    engine.end(0, 5)
    _, outputs, last = client.take()
    assert last and outputs["sequence_length"].tolist() == [[3, 4]]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_refusal_ends_the_whole_request_once_and_cancels_the_rest_of_it(
    engine: Engine, replies: Replies, streamed: bool
) -> None:
    client = Client()
    begin(replies, client, streamed, copies=3)
    engine.refuse(1, "the engine ended")
    assert client.take()[1:] == ("the engine ended", True)
    assert engine.cancelled == [0, 1, 2]
    engine.refuse(0, "the engine ended")
    engine.end(2, 5)
    time.sleep(0.02)
    assert client.responses.empty()


@pytest.mark.parametrize(
    ("reasons", "counts_as"),
    [(["stop"], "stop"), (["stop", "length"], "length"), (["length", "timeout", "stop"], "timeout")],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_of_several_rows_is_counted_once(
    engine: Engine, replies: Replies, counted: RequestMetrics, streamed: bool, reasons: list[str], counts_as: str
) -> None:
    client = Client()
    begin(replies, client, streamed, copies=len(reasons))
    for number, reason in enumerate(reasons):
        engine.end(number, 5, reason=reason)
    assert client.take()[2]
    replies.close()
    assert counted == RequestMetrics(request_success_total={counts_as: 1})


def test_what_is_refused_and_what_fails_is_counted_apart(
    engine: Engine, replies: Replies, counted: RequestMetrics
) -> None:
    dies, breaks, full, down = (Client() for _ in range(4))
    breaks.breaks = True
    for client in (dies, breaks, full):
        begin(replies, client)
    engine.requests[0][0](Failed("the engine ended"))
    engine.end(1, 5)
    engine.requests[2][0](Failed("too many wait", refused="queue_full"))
    engine.available = False
    begin(replies, down)
    for client in (dies, breaks, full, down):
        assert client.take()[2]
    replies.close()
    assert counted == RequestMetrics(request_refused_total={"queue_full": 1, "engine_down": 1}, request_failed_total=2)


def test_a_request_without_an_engine_is_answered_once(engine: Engine, replies: Replies) -> None:
    client = Client()
    engine.available = False
    begin(replies, client, copies=3)
    assert client.take()[1:] == ("no engine", True)
    time.sleep(0.02)
    assert client.responses.empty()


@pytest.mark.parametrize("streamed", [True, False])
def test_all_sequences_are_cancelled_when_their_client_left(engine: Engine, replies: Replies, streamed: bool) -> None:
    left, stays = Client(), Client()
    begin(replies, left, streamed, copies=2)
    begin(replies, stays, streamed)
    left.left = True
    deadline = time.monotonic() + CANCEL_CHECK_AGE + 10
    while len(engine.cancelled) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.cancelled == [0, 1]
    for number in (0, 1):
        engine.end(number, 5, reason="cancelled")
    assert left.take()[2]
    engine.end(2, 5)
    assert stays.take()[2]
    time.sleep(0.3)
    assert not left.asked_after_the_end and not stays.asked_after_the_end


def test_some_pieces_a_second_say_how_to_cancel(engine: Engine) -> None:
    replies = Replies(cast(EngineClient, engine), 1000.0, lambda counted: None)
    client = Client()
    begin(replies, client, copies=2)
    handles: list[Any] = []
    plain = 0
    while len(handles) < 3:
        engine.add(0, 5)
        _, outputs, _ = client.take()
        if "cancel_handle" in outputs:
            handles.append(outputs["cancel_handle"].tolist())
        else:
            plain += 1
    assert time.monotonic() - client.began >= 3 * HANDLE_INTERVAL
    assert handles == [[[b"handle 0", b"handle 1"]]] * 3
    assert plain > 0
    replies.close()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_request_whose_time_is_over_ends_with_what_there_is_though_the_engine_stands_still(
    engine: Engine, replies: Replies, streamed: bool
) -> None:
    client, patient = Client(), Client()
    begin(replies, client, streamed, copies=2, timeout=0.5)
    begin(replies, patient, streamed, timeout=100.0)
    engine.add(0, 5, 6)
    engine.end(1, 7)
    if streamed:
        client.take()
    seconds, outputs, last = client.take()
    assert last and 0.5 <= seconds < 2
    assert outputs["sequence_length"].tolist() == [[4, 3]]
    assert outputs["output_ids"][0, :, 2:4].tolist() == [[5, 6], [7, 9]]
    assert outputs["finish_reason"].tolist() == [[b"timeout", b"length"]]
    assert engine.cancelled == [0, 1]
    engine.add(0, 8)
    engine.end(0, 5, 6, 8, reason="cancelled")
    time.sleep(0.2)
    assert client.responses.empty() and patient.responses.empty()


def test_beams_whose_time_is_over_end_without_tokens(engine: Engine, replies: Replies) -> None:
    client = Client()
    rows = [Row([1, 2], [SamplingParams(request_output_len=500, end_ids=(9,), beam_width=3)])]
    replies.submit(Reply(TENSORS, rows, client), rows, timeout=0.1)
    _, outputs, last = client.take()
    assert last and outputs["sequence_length"].tolist() == [[2, 2, 2]]


def test_a_response_that_cannot_be_sent_ends_its_request_alone(engine: Engine, replies: Replies) -> None:
    broken, client = Client(), Client()
    begin(replies, broken)
    begin(replies, client)
    broken.breaks = True
    engine.add(0, 5)
    assert broken.take()[1] == "fault: no shared memory"
    assert engine.cancelled == [0]
    engine.end(1, 5)
    assert client.take()[2]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_request_that_cannot_be_handed_to_the_engine_ends_alone(
    engine: Engine, replies: Replies, counted: RequestMetrics, streamed: bool
) -> None:
    broken, client = Client(), Client()
    engine.breaks_at = 2
    begin(replies, broken, streamed, copies=4)
    assert broken.take()[1:] == ("fault: no file descriptor left", True)
    assert engine.cancelled == [0, 1]
    engine.breaks_at = None
    begin(replies, client, streamed)
    for number in range(3):
        engine.end(number, 5)
    assert client.take()[2]
    replies.close()
    assert broken.responses.empty()
    assert counted == RequestMetrics(request_success_total={"length": 1}, request_failed_total=1)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "many"])
def test_a_pace_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=f"stream_pieces_per_second is '{text}', allowed: a number above 0"):
        read_pace(text)
    assert read_pace("") == read_pace("1000") == 1000.0
