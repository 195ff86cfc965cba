"""Clients of a fleet: right requests whose answers are known, wrong ones, and clients that leave. Each request is sent
again where that is right, and every try is put down. Knows nothing of servers' processes."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gptj_triton.bench.holding.asking import Asker
from gptj_triton.bench.holding.load import BAD, LEFT, prompt
from gptj_triton.bench.holding.outcomes import Ended, Outcome

LEFT_TOKENS = 300  # of which nobody waits for the end
VARIANTS = 6  # of each right request
TOKENS = {"answer, 1 token": 1, "answer, 16 tokens": 16, "answer, 100 tokens": 100}
STREAM_TOKENS = {"stream, 16 tokens": 16, "stream, 100 tokens": 100, "stream, 300 tokens": 300}
REFUSED, LEAVES = f"{BAD}range", f"{LEFT}stream"
KINDS = (*TOKENS, *STREAM_TOKENS, REFUSED, LEAVES)
PAUSE_SECONDS = 0.5  # before a request is sent again, where nobody says how long
# Ends beside those of Outcome: an answer that is not the right one, and a stream that ended after its first part.
WRONG, STREAM_CUT = "wrong", "stream cut"


@dataclass(frozen=True)
class Question:
    """A request; `text` is what an undisturbed server answers, and empty where it answers none."""

    kind: str
    fields: Mapping[str, Any]
    text: str = ""

    async def ask(self, asker: Asker) -> Ended:
        if self.kind == LEAVES:
            return await asker.stream(**self.fields, leave_after_events=3)
        return await (asker.stream if self.kind in STREAM_TOKENS else asker.generate)(**self.fields)

    def judge(self, ended: Ended) -> str:
        """How one try ended, and whether it may."""
        text = str(ended.answer.get("text_output", ""))
        right = {
            Outcome.ANSWERED: bool(self.text) and text == self.text,
            Outcome.REFUSED: self.kind == REFUSED,
            Outcome.LEFT: self.kind == LEAVES,
        }.get(ended.outcome, not self.text or self.text.startswith(text))
        return WRONG if not right else STREAM_CUT if ended.begun and ended.is_not_served else ended.outcome.value


def make_questions(seed: int, longest: int) -> list[Question]:
    """Without their texts; answers have `longest` tokens at most."""
    chance = random.Random(seed)
    found = []
    for kind in KINDS:
        tokens = {**TOKENS, **STREAM_TOKENS}.get(kind, LEFT_TOKENS)
        if tokens > longest and kind in (*TOKENS, *STREAM_TOKENS):
            continue
        for _ in range(VARIANTS):
            fields = {"text_input": prompt(chance), "max_tokens": tokens, "min_tokens": tokens, "temperature": 1.0}
            fields |= {"top_p": 1.5 if kind == REFUSED else 0.9, "seed": chance.randrange(2**32)}
            found.append(Question(kind, fields))
    return found


async def with_texts(questions: Sequence[Question], asker: Asker) -> list[Question]:
    """The same with what a server answers that nothing disturbs. Raises ValueError where it does not."""
    free = asyncio.Semaphore(4)

    async def one(question: Question) -> Question:
        if question.kind in (REFUSED, LEAVES):
            return question
        async with free:
            ended = await question.ask(asker)
        if ended.outcome is not Outcome.ANSWERED:
            raise ValueError(f"{question.kind}: {ended}")
        return replace(question, text=str(ended.answer["text_output"]))

    return await asyncio.gather(*map(one, questions))


@dataclass(frozen=True)
class Asked:
    """What became of one question: how its tries ended, and the seconds from its first to the end of its last."""

    question: Question
    tries: Sequence[Ended]
    seconds: float

    @property
    def first(self) -> str:
        """What a client sees that sends nothing again."""
        return self.question.judge(self.tries[0])

    @property
    def last(self) -> str:
        """What a client sees that does."""
        return self.question.judge(self.tries[-1])


@dataclass
class Account:
    """All that clients asked in one part of a run."""

    asked: list[Asked] = field(default_factory=list)
    sent: int = 0

    def of(self, kind: str) -> list[Asked]:
        return [each for each in self.asked if each.question.kind == kind]

    def lasts(self) -> Counter[str]:
        return Counter(each.last for each in self.asked)

    def firsts(self) -> Counter[str]:
        return Counter(each.first for each in self.asked)

    def words(self) -> Counter[str]:
        """What clients were told, or saw, at every try that did not end as it should."""
        fair = {Outcome.ANSWERED.value, Outcome.REFUSED.value, Outcome.LEFT.value}
        return Counter(
            f"{end}: {re.sub('[0-9]+', 'N', ended.words)[:120]}"
            for each in self.asked
            for ended in each.tries
            if (end := each.question.judge(ended)) not in fair
        )


@dataclass
class Clients:
    """Each asks one question after another, of its own asker, and sends again what may be sent again, up to `retries`
    times. Which question comes when is drawn from `seed`."""

    askers: Sequence[Asker]
    questions: Sequence[Question]
    retries: int
    seed: int

    async def run(self, account: Account, stopped: asyncio.Event) -> None:
        """Until `stopped`, and returns when every question has an end."""
        kinds = sorted({each.kind for each in self.questions})
        by_kind = [[each for each in self.questions if each.kind == kind] for kind in kinds]

        async def client(asker: Asker, chance: random.Random) -> None:
            while not stopped.is_set():
                question = chance.choice(chance.choice(by_kind))
                account.sent += 1
                account.asked.append(await self.ask(asker, question))

        chances = (random.Random(self.seed + number) for number in range(len(self.askers)))
        await asyncio.gather(*map(client, self.askers, chances))

    async def ask(self, asker: Asker, question: Question) -> Asked:
        started = time.monotonic()
        tries = [await question.ask(asker)]
        while tries[-1].may_retry and len(tries) <= self.retries:
            await asyncio.sleep(tries[-1].retry_after or PAUSE_SECONDS)
            tries.append(await question.ask(asker))
        return Asked(question, tries, time.monotonic() - started)
