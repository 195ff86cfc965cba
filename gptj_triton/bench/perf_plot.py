"""Draws throughput against latency, a line for each endpoint, a point for each concurrency. Knows no servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptj_triton.plots import BLUE, GREEN, ORANGE, Label, new_plot, save

Point = tuple[int, float, float]  # concurrency, p50 latency in ms, answers a second
COLOURS, MARKERS = (BLUE, ORANGE, GREEN), "os^"


def draw(title: str, lines: Mapping[str, Sequence[Point]], target: Path) -> None:
    """Writes the PNG with each of `lines`, at most as many as COLOURS, under its name."""
    figure, [axes] = new_plot()
    labels = []
    for (name, points), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        axes.plot([p50 for _, p50, _ in points], [rate for *_, rate in points], color=colour, marker=marker, label=name)
        labels += [Label(str(concurrency), p50, rate, colour) for concurrency, p50, rate in points]
    axes.set(xlabel="p50 latency of an answer (ms)", ylabel="throughput (answers/s)")
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    save(figure, f"{title}\nnumbers at points: clients at a time", target, labels)
