"""Results as a Markdown table. Knows no more than what results.json holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptj_triton.bench.results import Result

# What must be the same in results that are joined.
SETTINGS = ("benchmark", "model", "machine", "device", "data_type", "prompt_tokens", "output_tokens")
COLUMNS = (
    *("clients", "system", "requests", "requests/s", "tokens/s", "latency, ms", "first token, ms"),
    *("ms a token", "memory, MiB", "cores"),
)
GPU_COLUMNS = ("GPU load, %", "GPU memory, MiB")


class MergeError(Exception):
    """Results of different settings cannot be joined; the message names what differs."""


def table(result: Result) -> str:
    """A line for each system and number of clients; columns of the GPU where there was one."""
    measurements = result["measurements"]
    on_gpu = any(each["gpu_load_percent"] is not None for each in measurements)
    columns = COLUMNS + GPU_COLUMNS if on_gpu else COLUMNS
    lines = [cells(each, result["output_tokens"], on_gpu) for each in measurements]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines])


def cells(measurement: dict[str, Any], output_tokens: int, on_gpu: bool) -> list[str]:
    """`ms a token` is the p50 latency divided by the new tokens: a decode step, where no request waits for another."""
    line = [
        str(measurement["clients"]),
        measurement["system"],
        str(measurement["requests"]),
        f"{measurement['requests_per_second']:.2f}",
        f"{measurement['tokens_per_second']:,.0f}",
        times(measurement["latency_ms"]),
        times(measurement["first_token_ms"]),
        f"{measurement['latency_ms'][0] / output_tokens:,.1f}",
        f"{measurement['memory_mib']:,.0f}",
        f"{measurement['cores']:.2f}",
    ]
    if on_gpu:
        figures = (measurement[name] for name in ("gpu_load_percent", "gpu_memory_mib"))
        line += ["" if figure is None else f"{figure:,.0f}" for figure in figures]
    return line


def times(milliseconds: Sequence[float]) -> str:
    return " / ".join(f"{each:,.0f}" for each in milliseconds)


def ratios(measurements: Sequence[dict[str, Any]], baseline: str, system: str) -> dict[int, float]:
    """Throughput of `system` divided by that of `baseline`, by the number of clients."""
    found = {(each["system"], each["clients"]): each["tokens_per_second"] for each in measurements}
    return {
        clients: speed / found[baseline, clients]
        for (name, clients), speed in found.items()
        if name == system and (baseline, clients) in found
    }


def heading(result: Result) -> str:
    """What was asked of which model on which machine."""
    lengths = f"{result['prompt_tokens']} tokens in, {result['output_tokens']} out"
    return f"{result['model']}, {result['data_type']}, {lengths}, {result['machine']}"


def merge(results: Sequence[Result]) -> Result:
    """One result with the measurements of several runs in the same setting. Raises MergeError."""
    merged = dict(results[0])
    for name in SETTINGS:
        values = [result[name] for result in results]
        for value in values:
            if value != values[0]:
                raise MergeError(f"results of different settings: {name} is {values[0]!r} in one, {value!r} in another")
    for name in ("measurements", "texts", "left_out"):
        merged[name] = [each for result in results for each in result[name]]
    return merged


def summary(result: Result, baseline: str) -> str:
    """The table, and what it does not show: texts equal to the baseline's, and what was left out."""
    lines = [
        f"{heading(result)}. Times are p50 / p90 / p99.",
        "",
        table(result),
        "",
        f"| clients | system | same text as {baseline} |",
        "| --- | --- | --- |",
        *(f"| {each['clients']} | {each['system']} | {each['equal']} of {each['of']} |" for each in result["texts"]),
        "",
    ]
    lines += [f"Left out: {each}" for each in result["left_out"]]
    return "\n".join(lines).rstrip() + "\n"
