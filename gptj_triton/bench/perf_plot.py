"""Draws throughput against latency, one line a way in, a point a concurrency. Knows nothing of servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Point = tuple[int, float, float]  # concurrency, p50 latency in ms, answers a second
# A line's colour, marker, and where the labels of its points stand from them (points, and what of the text is there):
# lines may lie upon each other.
STYLES = (
    ("tab:blue", "o", (-6, 5), "right"),
    ("tab:orange", "s", (6, -11), "left"),
    ("tab:green", "^", (6, 5), "left"),
)


def plot(title: str, lines: Mapping[str, Sequence[Point]], target: Path) -> None:
    """Write the PNG; each of `lines`, at most as many as STYLES, is drawn under its name in the order of its points."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (name, points), (colour, marker, offset, side) in zip(lines.items(), STYLES, strict=False):
        axes.plot([p50 for _, p50, _ in points], [rate for *_, rate in points], color=colour, marker=marker, label=name)
        for concurrency, p50, rate in points:
            label = str(concurrency)
            axes.annotate(label, (p50, rate), offset, textcoords="offset points", ha=side, fontsize=8, color=colour)
    axes.set(xlabel="p50 latency of an answer (ms)", ylabel="throughput (answers/s)", title=title)
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(title="numbers: clients at a time")
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
