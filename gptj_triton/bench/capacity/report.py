"""What the command prints of a kind of replica and of a plan."""

from __future__ import annotations

from gptj_triton.bench.capacity.replica_files import ReplicaKind
from gptj_triton.bench.capacity.simulation import Seen
from gptj_triton.bench.capacity.sizing import Plan

COLUMNS = {
    "first token": "first_token",
    "between tokens": "between_tokens",
    "their mean": "mean_between",
    "whole": "whole",
}


def of_kind(kind: ReplicaKind) -> str:
    settings = kind.settings
    return (
        f"{kind.machine}: step times of {kind.times.points} points, {kind.times.error:.1%} off in the median\n"
        f"KV cache of {settings.num_pages * settings.page_size:,} tokens, max_sequences {settings.max_sequences}, "
        f"step_tokens {settings.step_tokens}, {1e3 * settings.own_seconds:.1f} ms of a request outside the engine"
    )


def of_plan(plan: Plan, gpus: int, price: float | None) -> str:
    heading = f"{'requests/s':>10} " + " ".join(f"{name + ', ms':>19}" for name in COLUMNS) + f" {'refused':>8}"
    below = f"{'':>10} " + " ".join(f"{'p50':>9} {'p99':>9}" for _ in COLUMNS)
    lines = ["", "one replica", heading, below]
    lines += [row(point.rate, point.seen) for point in plan.points]
    full = plan.saturation
    lines += [
        f"saturates at {full.requests:,.1f} requests/s, {full.tokens:,.0f} output tokens/s: "
        f"{full.sequences:.0f} sequences at once, KV cache {full.kv_cache:.0%} used, "
        f"{full.preemptions} preemptions, a step {full.step_ms:.1f} ms",
        f"what limits it: {full.limit}",
        f"the most within what is wanted: {plan.share:,.1f} requests/s, {plan.share / full.requests:.0%} of that",
        "",
        f"{plan.rate:,g} requests/s: {plan.replicas:,} replicas, {24 * plan.replicas * gpus:,} GPU hours a day"
        + (f", {24 * plan.replicas * gpus * price:,.0f} a day" if price is not None else ""),
        row(plan.rate / plan.replicas, plan.seen) + "  each",
    ]
    return "\n".join(lines)


def row(rate: float, seen: Seen) -> str:
    figures = (getattr(seen, name) for name in COLUMNS.values())
    return (
        f"{rate:>10.1f} " + " ".join(f"{each.p50:>9.1f} {each.p99:>9.1f}" for each in figures) + f" {seen.refused:>8}"
    )
