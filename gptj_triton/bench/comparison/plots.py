"""Draws results: throughput against latency, and times to the first token, a line for each system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from gptj_triton.bench.comparison.report import Result, heading

# By the order in which systems appear: colour, and where the labels of its points stand.
STYLES = (
    ("tab:red", (0, 7)),
    ("tab:orange", (12, -3)),
    ("tab:blue", (0, 7)),
    ("tab:green", (0, -15)),
)
LABEL = {"fontsize": 8, "ha": "center", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}


def series(rows: Sequence[Result]) -> dict[str, list[Result]]:
    """The rows of each system, by the number of clients."""
    found: dict[str, list[Result]] = {}
    for row in rows:
        found.setdefault(row["system"], []).append(row)
    return {system: sorted(each, key=lambda row: int(row["clients"])) for system, each in found.items()}


def draw_throughput(result: Result, target: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (system, rows), (colour, offset) in zip(series(result["rows"]).items(), STYLES, strict=False):
        latency = [row["latency_ms"][0] / 1000 for row in rows]
        speed = [row["tokens_per_second"] for row in rows]
        axes.plot(latency, speed, "o-", color=colour, label=system)
        for row, x, y in zip(rows, latency, speed, strict=True):
            axes.annotate(str(row["clients"]), (x, y), offset, textcoords="offset points", color=colour, **LABEL)
    axes.set(xscale="log", yscale="log", xlabel="latency of a request, p50 (s)", ylabel="throughput (new tokens/s)")
    plain_numbers(axes)
    axes.margins(0.07, 0.1)  # room for labels
    finish(figure, axes, f"{heading(result)}; points are labelled with the number of clients", target)


def draw_first_token(result: Result, target: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    clients = sorted({row["clients"] for row in result["rows"]})
    for (system, rows), (colour, _) in zip(series(result["rows"]).items(), STYLES, strict=False):
        times = [row["first_token_ms"][0] / 1000 for row in rows]
        axes.plot([row["clients"] for row in rows], times, "o-", color=colour, label=system)
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="time to the first token, p50 (s)")
    plain_numbers(axes)
    axes.set_xticks(clients, [str(each) for each in clients])
    axes.xaxis.set_minor_locator(NullLocator())
    finish(figure, axes, f"{heading(result)}; without streaming the first token comes with the last", target)


def plain_numbers(axes: pyplot.Axes) -> None:
    """0.5 and 20 instead of powers of ten."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def finish(figure: pyplot.Figure, axes: pyplot.Axes, title: str, target: Path) -> None:
    axes.set_title(title.replace("; ", "\n"), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
