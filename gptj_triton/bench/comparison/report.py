"""Results as a Markdown table. Knows no more than the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]  # what compare.py writes as results.json

COLUMNS = ("clients", "system", "requests/s", "tokens/s", "latency, ms", "first token, ms", "memory, MiB", "cores")
GPU_COLUMNS = ("GPU load, %", "GPU memory, MiB")


def table(rows: Sequence[Result]) -> str:
    """A line for each system and number of clients; columns of the GPU where there was one."""
    on_gpu = any(row["gpu_load_percent"] is not None for row in rows)
    columns = COLUMNS + GPU_COLUMNS if on_gpu else COLUMNS
    lines = [columns, ["---"] * len(columns), *(cells(row, on_gpu) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Result, on_gpu: bool) -> list[str]:
    line = [
        str(row["clients"]),
        row["system"],
        f"{row['requests_per_second']:.2f}",
        f"{row['tokens_per_second']:,.0f}",
        times(row["latency_ms"]),
        times(row["first_token_ms"]),
        f"{row['memory_mib']:,.0f}",
        f"{row['cores']:.2f}",
    ]
    if on_gpu:
        line += ["" if row[name] is None else f"{row[name]:,.0f}" for name in ("gpu_load_percent", "gpu_memory_mib")]
    return line


def times(milliseconds: Sequence[float]) -> str:
    return " / ".join(f"{each:,.0f}" for each in milliseconds)


def ratios(rows: Sequence[Result], before: str, after: str) -> dict[int, float]:
    """Throughput of `after` in that of `before`, by the number of clients."""
    found = {(row["system"], row["clients"]): row["tokens_per_second"] for row in rows}
    return {
        clients: speed / found[before, clients]
        for (system, clients), speed in found.items()
        if system == after and (before, clients) in found
    }


def heading(result: Result) -> str:
    """What was asked of which model on which machine."""
    return f"{result['model']}, {result['prompt_tokens']} tokens in, {result['output_tokens']} out, {result['machine']}"


def merge(results: Sequence[Result]) -> Result:
    """One result with the rows of several runs in the same setting."""
    merged = dict(results[0])
    for name in ("rows", "texts", "left_out"):
        merged[name] = [each for result in results for each in result[name]]
    return merged


def summary(result: Result) -> str:
    """The table, and what it does not show: equal texts, and what was left out."""
    lines = [
        f"{heading(result)}. Times are p50 / p90 / p99.",
        "",
        table(result["rows"]),
        "",
        "| clients | system | same text as before |",
        "| --- | --- | --- |",
        *(f"| {each['clients']} | {each['system']} | {each['equal']} of {each['of']} |" for each in result["texts"]),
        "",
    ]
    lines += [f"Left out: {each}" for each in result["left_out"]]
    return "\n".join(lines).rstrip() + "\n"
