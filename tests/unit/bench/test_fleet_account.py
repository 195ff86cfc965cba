"""How a fleet's requests are judged, sent again, and accounted for. No server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from gptj_triton.bench.holding.asking import Asker
from gptj_triton.bench.holding.fleet import parse_arguments
from gptj_triton.bench.holding.fleet_clients import (
    KINDS,
    LEAVES,
    REFUSED,
    STREAM_CUT,
    WRONG,
    Account,
    Asked,
    Clients,
    Question,
    make_questions,
)
from gptj_triton.bench.holding.fleet_report import Event, Part, summary
from gptj_triton.bench.holding.outcomes import Ended, Outcome

ANSWER = Question("answer, 16 tokens", {}, "a king")
STREAM = Question("stream, 16 tokens", {}, "a king")


def ended(outcome: Outcome, text: str = "", begun: bool = False, retry_after: float = 0.0) -> Ended:
    return Ended(outcome, answer={"text_output": text} if text else {}, begun=begun, retry_after=retry_after)


@pytest.mark.parametrize(
    ("question", "end", "judged"),
    [
        (ANSWER, ended(Outcome.ANSWERED, "a king"), "answered"),
        (ANSWER, ended(Outcome.ANSWERED, "a queen"), WRONG),
        (ANSWER, ended(Outcome.ANSWERED), WRONG),
        (ANSWER, ended(Outcome.REFUSED), WRONG),
        (ANSWER, ended(Outcome.LEFT), WRONG),
        (ANSWER, ended(Outcome.UNAVAILABLE), "unavailable"),
        (ANSWER, ended(Outcome.CUT), "cut"),
        (ANSWER, ended(Outcome.HUNG), "hung"),
        (STREAM, ended(Outcome.CUT, "a k", begun=True), STREAM_CUT),
        (STREAM, ended(Outcome.UNAVAILABLE, "a k", begun=True), STREAM_CUT),
        (STREAM, ended(Outcome.CUT, "a q", begun=True), WRONG),
        (Question(REFUSED, {}), ended(Outcome.REFUSED), "refused"),
        (Question(REFUSED, {}), ended(Outcome.ANSWERED, "a king"), WRONG),
        (Question(LEAVES, {}), ended(Outcome.LEFT), "left"),
    ],
)
def test_an_end_is_judged_by_what_was_asked(question: Question, end: Ended, judged: str) -> None:
    assert question.judge(end) == judged


class Scripted(Asker):
    """Ends requests as it is told to."""

    def __init__(self, *ends: Ended) -> None:
        self.ends = list(ends)

    async def generate(self, *_: object, **__: object) -> Ended:
        return self.ends.pop(0)

    stream = generate


def ask(question: Question, *ends: Ended, retries: int = 1) -> Asked:
    return asyncio.run(Clients([], [], retries, 0).ask(Scripted(*ends), question))


DOWN = ended(Outcome.UNAVAILABLE, retry_after=0.01)


def test_what_is_not_served_is_sent_again_so_often() -> None:
    right = ended(Outcome.ANSWERED, "a king")
    once = ask(ANSWER, DOWN, right)
    assert (once.first, once.last, once.seconds >= 0.01) == ("unavailable", "answered", True)
    assert ask(ANSWER, DOWN, DOWN, right).last == "unavailable"
    assert ask(ANSWER, DOWN, DOWN, right, retries=2).last == "answered"


def test_a_stream_that_has_begun_and_a_wrong_request_are_not_sent_again() -> None:
    assert len(ask(STREAM, ended(Outcome.CUT, "a", begun=True)).tries) == 1
    assert len(ask(Question(REFUSED, {}), ended(Outcome.REFUSED)).tries) == 1


def part_of(asked: Sequence[Asked], sent: int | None = None, nothing_cut: bool = False) -> Part:
    account = Account(list(asked), len(asked) if sent is None else sent)
    return Part("nginx", "kills", account, [Event("restarted", "server1", 1.0, 1.2, 0)], nothing_cut)


def test_a_part_in_which_all_was_served_in_the_end_broke_nothing() -> None:
    right = ended(Outcome.ANSWERED, "a king")
    cut = ended(Outcome.CUT, "a", begun=True)
    part = part_of([Asked(ANSWER, [DOWN, right], 3.0), Asked(ANSWER, [right], 1.0), Asked(STREAM, [cut], 1.0)])
    assert part.broken == []
    together = part.rows[-1]
    assert (together.sent, together.median_s, together.worst_s) == (3, 2.0, 3.0)
    assert together.first == {"unavailable": 1, "answered": 1, STREAM_CUT: 1}
    assert together.last == {"answered": 2, STREAM_CUT: 1}
    assert "server1" in str(part)
    assert "| nginx, kills | 3 | 1 | 1 | 0 | 1 |" in summary([part])
    assert "| answer, 16 tokens | 2.00, 3.0 |" in summary([part])
    assert "| restarted | 1 | 1.2, 1.2 |" in summary([part])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (part_of([Asked(ANSWER, [DOWN, DOWN], 1.0)]), "1 requests were lost, unavailable, that may be sent again"),
        (part_of([Asked(ANSWER, [ended(Outcome.ANSWERED, "a queen")], 1.0)]), "1 requests wrong"),
        (part_of([Asked(ANSWER, [ended(Outcome.HUNG)], 1.0)]), "1 requests hung"),
        (part_of([], sent=1), "1 requests have no end"),
        (part_of([Asked(STREAM, [ended(Outcome.CUT, "a", begun=True)], 1.0)], nothing_cut=True), "1 streams were cut"),
        (Part("nginx", "kills", events=[Event("restarted", "server1", 1.0, 1.2, 3)]), "server1: exit status 3"),
        (Part("nginx", "kills", events=[Event("killed", "server1", 1.0, None)]), "server1 took no requests any more"),
    ],
)
def test_what_is_lost_wrong_or_never_back_is_told(part: Part, words: str) -> None:
    assert part.broken == [f"nginx, kills: {words}"]


def test_questions_are_the_same_for_the_same_seed_and_of_every_kind() -> None:
    assert make_questions(3, 300) == make_questions(3, 300) != make_questions(4, 300)
    assert {question.kind for question in make_questions(3, 300)} == set(KINDS)
    assert {question.kind for question in make_questions(3, 1)} == {"answer, 1 token", LEAVES, REFUSED}


@pytest.mark.parametrize(
    "option", ["--minutes=0", "--kill-every=0", "--servers=1", "--clients=0", "--retries=-1", "--longest=0"]
)
def test_a_value_out_of_range_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([option])
    assert option.partition("=")[0] in capsys.readouterr().err
