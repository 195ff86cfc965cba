"""How the holding commands judge answers, account for requests and draw inputs. No server."""

from __future__ import annotations

import pytest

from gptj_triton.bench.holding.fuzz import draw_inputs
from gptj_triton.bench.holding.load import BAD, LEFT, unexpected
from gptj_triton.bench.holding.outcomes import Ended, Ledger, Outcome, StreamEnd, of_grpc, of_http
from gptj_triton.bench.holding.raw_http import of_bytes
from gptj_triton.bench.holding.soak import Sample, check_ledger, slopes


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, b'{"text_output":"a"}', Outcome.ANSWERED),
        (400, b'{"error":"top_p is 2"}', Outcome.REFUSED),
        (400, b'{"error":"in ensemble \'ensemble\', UNAVAILABLE: the engine is down"}', Outcome.UNAVAILABLE),
        (503, b'{"error":"the engine is down"}', Outcome.UNAVAILABLE),
        (502, b'{"error":"no server answered"}', Outcome.UNAVAILABLE),
        (500, b'{"error":"failed to parse the request JSON buffer: Invalid value. at 0"}', Outcome.REFUSED),
        (500, b'{"error":"parameter key \'a\' was not found in the JSON"}', Outcome.REFUSED),
        (500, b'{"error":"Converting keyword: parameter key \'\\n\' was not found in the JSON"}', Outcome.REFUSED),
        (500, b'{"error":"KeyError"}', Outcome.FAILED),
        (500, b'{"error":"the file was not found"}', Outcome.FAILED),
        (501, b'{"error":"decoupled"}', Outcome.REFUSED),
        (200, b"", Outcome.MALFORMED),
        (200, b"[]", Outcome.MALFORMED),
        (200, b'{"text_output":"\xff"}', Outcome.MALFORMED),
        (400, b'{"error":"unexpected inference input \'\xff\'"}', Outcome.REFUSED),
        (404, b"{}", Outcome.MALFORMED),
        (200, b'data: {"text_output":"a","finish_reason":""}\n\n', Outcome.CUT),
        (200, b'data: {"text_output":"a","finish_reason":"stop"}\n\n', Outcome.ANSWERED),
    ],
)
def test_an_answer_over_http_is_judged_by_status_and_words(status: int, body: bytes, outcome: Outcome) -> None:
    assert of_http(status, body).outcome is outcome


@pytest.mark.parametrize(
    ("status", "message", "outcome"),
    [
        ("StatusCode.INVALID_ARGUMENT", "top_p", Outcome.REFUSED),
        ("StatusCode.UNAVAILABLE", "UNAVAILABLE: the engine is down", Outcome.UNAVAILABLE),
        ("StatusCode.UNAVAILABLE", "Socket closed", Outcome.CUT),
        ("StatusCode.UNAVAILABLE", "failed to connect to all addresses", Outcome.CUT),
        ("StatusCode.INTERNAL", "KeyError", Outcome.FAILED),
        ("StatusCode.INTERNAL", "Failed to increase the shared memory pool size for key 'x'", Outcome.REFUSED),
        ("StatusCode.INTERNAL", "Stub process 'a_0_0' is not healthy.", Outcome.UNAVAILABLE),
        ("INVALID_ARGUMENT", "in ensemble, UNAVAILABLE: the engine is down", Outcome.UNAVAILABLE),
    ],
)
def test_an_error_over_grpc_is_judged_by_its_code(status: str, message: str, outcome: Outcome) -> None:
    assert of_grpc(status, message).outcome is outcome


def test_a_stream_may_come_in_any_parts() -> None:
    stream = StreamEnd(200)
    for part in (b'data: {"finish_', b'reason":""}\n\nda', b'ta: {"finish_reason":"length"}\n\n'):
        stream.feed(part)
    assert (stream.events, stream.ended().outcome) == (2, Outcome.ANSWERED)


def test_what_has_begun_may_not_be_sent_again() -> None:
    text, error = b'data: {"text_output":"a","finish_reason":""}\n\n', b'data: {"error":"UNAVAILABLE: ends"}\n\n'
    for events, may_retry in ([], True), ([text], False), ([error], True), ([text, error], False):
        stream = StreamEnd(200)
        for event in events:
            stream.feed(event)
        assert stream.cut("the connection ended").may_retry == stream.ended().may_retry == may_retry


def test_a_stream_has_the_text_of_all_its_events() -> None:
    stream = StreamEnd(200)
    stream.feed(
        b'data: {"text_output":"a ","finish_reason":""}\n\ndata: {"text_output":"king","finish_reason":"stop"}\n\n'
    )
    assert stream.ended().answer == {"text_output": "a king", "finish_reason": "stop"}


def test_bytes_of_a_connection_are_an_answer_only_when_it_is_whole() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
    assert of_bytes(head + b'{"a"').outcome is Outcome.MALFORMED
    assert of_bytes(head + b"{").outcome is Outcome.CUT
    assert (
        of_bytes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n").outcome
        is Outcome.ANSWERED
    )
    assert of_bytes(b"nonsense").outcome is Outcome.MALFORMED


def ledger_of(**ends: Outcome) -> Ledger:
    ledger = Ledger()
    for kind, outcome in ends.items():
        name = kind.replace("bad_", BAD).replace("left_", LEFT)
        ledger.sent[name] += 1
        ledger.note(name, Ended(outcome))
    return ledger


def test_a_request_without_an_end_is_missed() -> None:
    ledger = ledger_of(generate=Outcome.ANSWERED)
    ledger.sent["stream"] += 1
    assert ledger.missing == 1
    assert any("no end" in fault for fault in check_ledger(ledger, (0, 0), (2, 0)))


def test_each_kind_has_the_ends_that_it_may_have() -> None:
    right = ledger_of(
        generate=Outcome.ANSWERED, bad_range=Outcome.REFUSED, left_stream=Outcome.LEFT, left_b=Outcome.ANSWERED
    )
    assert unexpected(right) == {}
    wrong = ledger_of(generate=Outcome.CUT, bad_range=Outcome.ANSWERED, left_stream=Outcome.FAILED)
    assert unexpected(wrong) == {"generate: cut": 1, "bad: range: answered": 1, "left: stream: failed": 1}


def test_what_triton_counted_must_agree_to_the_request() -> None:
    ledger = ledger_of(generate=Outcome.ANSWERED, bad_range=Outcome.REFUSED, left_stream=Outcome.LEFT)
    for counted in ((1, 1), (2, 1)):  # with and without the one that was left
        assert check_ledger(ledger, (5, 5), (5 + counted[0], 5 + counted[1])) == []
    for counted in ((0, 1), (1, 0), (3, 1)):
        assert check_ledger(ledger, (5, 5), (5 + counted[0], 5 + counted[1])) != []


def test_slopes_are_taken_after_the_start_and_a_jump_counts_little() -> None:
    samples = [
        Sample(60.0 * i, 100 * i, {"engine": 1000.0 + 50 * i, "launcher": 900.0 if i == 20 else 5.0}) for i in range(41)
    ]
    engine, launcher = slopes([Sample(0.0, 0, {"engine": 0.0, "launcher": 0.0}), *samples[1:]])
    assert (engine.process, engine.kib_per_minute, engine.bytes_per_request) == ("engine", 50.0, 512.0)
    assert launcher.kib_per_minute == 0.0


def test_equal_seeds_draw_equal_inputs() -> None:
    assert draw_inputs(30, 7) == draw_inputs(30, 7) != draw_inputs(30, 8)
