"""What a fleet did in one part of a run: the account as tables, and which promises were broken. Runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from gptj_triton.bench.holding.fleet_clients import KINDS, STREAM_CUT, WRONG, Account, Asked
from gptj_triton.bench.holding.outcomes import Outcome

ENDS = (*(outcome.value for outcome in Outcome), STREAM_CUT, WRONG)
SERVED = (Outcome.ANSWERED.value, Outcome.REFUSED.value, Outcome.LEFT.value)
NOT_SERVED = (Outcome.UNAVAILABLE.value, Outcome.CUT.value)
# Of these none may come, whatever is killed.
NEVER = (WRONG, Outcome.FAILED.value, Outcome.MALFORMED.value, Outcome.HUNG.value)
TOGETHER = "together"


@dataclass(frozen=True)
class Event:
    """Something that was done to a server. Seconds count from then on; None where it did not come to that."""

    what: str
    server: str
    ready_s: float | None
    taken_s: float | None  # until it had answered a request that the proxy sent it
    status: int | None = None  # with which it ended, where it was asked to

    def __str__(self) -> str:
        times = [f"{name} {'never' if s is None else f'{s:.1f} s'}" for name, s in self._times]
        return f"{self.what:<26} {self.server:<10} " + ", ".join(times)

    @property
    def _times(self) -> list[tuple[str, float | None]]:
        return [("ready after", self.ready_s), ("took requests after", self.taken_s)]


@dataclass(frozen=True)
class Row:
    """All requests of one kind: their ends for clients that send nothing again, and for those that do; the seconds that
    the latter waited for an answer."""

    proxy: str
    part: str
    request: str
    sent: int
    first: dict[str, int]
    last: dict[str, int]
    median_s: float
    worst_s: float

    @classmethod
    def of(cls, part: Part, request: str, asked: Sequence[Asked]) -> Row:
        waited = [each.seconds for each in asked if each.last == Outcome.ANSWERED.value] or [0.0]
        first, last = (dict(Counter(ends)) for ends in zip(*((each.first, each.last) for each in asked), strict=True))
        return cls(part.proxy, part.name, request, len(asked), first, last, median(waited), max(waited))


@dataclass
class Part:
    """One part of a run behind one proxy."""

    proxy: str
    name: str
    account: Account = field(default_factory=Account)
    events: list[Event] = field(default_factory=list)
    nothing_cut: bool = False  # it is one in which no stream may be cut either

    @property
    def rows(self) -> list[Row]:
        kinds = ((kind, self.account.of(kind)) for kind in KINDS)
        return [Row.of(self, kind, asked) for kind, asked in [*kinds, (TOGETHER, self.account.asked)] if asked]

    @property
    def broken(self) -> list[str]:
        """Promises that were not kept, in words."""
        firsts, lasts = self.account.firsts(), self.account.lasts()
        found = [f"{n} requests were lost, {end}, that may be sent again" for end in NOT_SERVED if (n := lasts[end])]
        found += [f"{n} requests {end}" for end in NEVER if (n := max(firsts[end], lasts[end]))]
        if missing := self.account.sent - len(self.account.asked):
            found.append(f"{missing} requests have no end")
        if self.nothing_cut and (n := lasts[STREAM_CUT]):
            found.append(f"{n} streams were cut")
        found += [f"{each.server}: exit status {each.status}" for each in self.events if each.status]
        found += [f"{each.server} took no requests any more" for each in self.events if each.taken_s is None]
        return [f"{self.proxy}, {self.name}: {each}" for each in found]

    def __str__(self) -> str:
        lines = [f"{self.proxy}, {self.name}", *(f"  {event}" for event in self.events), ""]
        rows = self.rows
        lines += ["Clients that send nothing again:", *table(rows, [row.first for row in rows]), ""]
        waits = [f"{row.median_s:>9.2f} {row.worst_s:>8.2f}" for row in rows]
        again = table(rows, [row.last for row in rows], [f"{'median s':>9} {'worst s':>8}", *waits])
        lines += ["Clients that send again what may be sent again:", *again]
        if words := self.account.words():
            lines += ["", "What was not served, each try by itself:"]
            lines += [f"{n:>7} {text}" for text, n in words.most_common()]
        return "\n".join(lines)


def summary(parts: Sequence[Part]) -> str:
    """In Markdown: what became of the requests, how long clients waited, and when servers were back."""
    lines = [
        "| proxy, part | requests | served at once | when sent again | lost or wrong | streams cut |",
        "| --- " * 6 + "|",
    ]
    for part in parts:
        lasts, count = part.account.lasts(), len(part.account.asked)
        at_once, served = (sum(ends[each] for each in SERVED) for ends in (part.account.firsts(), lasts))
        cells = [count, at_once, served - at_once, count - served - lasts[STREAM_CUT], lasts[STREAM_CUT]]
        lines.append(f"| {part.proxy}, {part.name} | {' | '.join(map(str, cells))} |")
    lines += ["", "| a client waited, median and worst s | " + " | ".join(f"{p.proxy}, {p.name}" for p in parts) + " |"]
    lines.append("| --- " * (1 + len(parts)) + "|")
    for kind in KINDS:
        rows = [next((row for row in part.rows if row.request == kind), None) for part in parts]
        if any(row and row.worst_s for row in rows):
            waits = (f"{row.median_s:.2f}, {row.worst_s:.1f}" if row else "" for row in rows)
            lines.append(f"| {kind} | {' | '.join(waits)} |")
    lines += ["", "| a server | times | took requests again after s, median and worst |", "| --- | --- | --- |"]
    events = [event for part in parts for event in part.events]
    for what in sorted({event.what for event in events}):
        taken = [event.taken_s for event in events if event.what == what and event.taken_s is not None] or [0.0]
        lines.append(f"| {what} | {len(taken)} | {median(taken):.1f}, {max(taken):.1f} |")
    return "\n".join(lines)


def table(rows: Sequence[Row], ends: Sequence[dict[str, int]], more: Sequence[str] = ()) -> Iterable[str]:
    used = [end for end in ENDS if any(end in each for each in ends)]
    cells = [f"{'request':<20} {'sent':>6} " + " ".join(f"{end:>11}" for end in used)]
    for row, counts in zip(rows, ends, strict=True):
        cells.append(f"{row.request:<20} {row.sent:>6} " + " ".join(f"{counts.get(end, 0):>11}" for end in used))
    return [" ".join(each) for each in zip(cells, more, strict=True)] if more else cells
