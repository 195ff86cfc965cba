"""Draws results: throughput against latency, and times to the first token, a line for each system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.ticker import NullLocator

from gptj_triton.bench.comparison.report import heading
from gptj_triton.bench.comparison.systems import BASELINE, BATCHED, STREAMED, THIS
from gptj_triton.bench.results import Result
from gptj_triton.plots import BLUE, GREEN, ORANGE, RED, Label, new_plot, plain_numbers, save

COLOURS = {BASELINE: RED, BATCHED: ORANGE, THIS: BLUE, STREAMED: GREEN}


def draw_throughput(result: Result, target: Path) -> None:
    figure, [axes] = new_plot()
    labels = draw_throughput_lines(result, axes)
    title = f"{heading(result)}\nnumbers at points: clients at a time"
    save(figure, title, target, labels)


def draw_throughput_lines(result: Result, axes: pyplot.Axes) -> list[Label]:
    """Draws the lines; the labels that belong to their points."""
    labels = []
    for system, measurements in by_system(result).items():
        latency = [each["latency_ms"][0] / 1000 for each in measurements]
        speed = [each["tokens_per_second"] for each in measurements]
        axes.plot(latency, speed, "o-", color=COLOURS[system], label=system)
        labels += [
            Label(str(each["clients"]), x, y, COLOURS[system])
            for each, x, y in zip(measurements, latency, speed, strict=True)
        ]
    plain_numbers(axes)
    axes.set(xlabel="latency of a request, p50 (s)", ylabel="throughput (new tokens/s)")
    axes.margins(0.07, 0.1)  # room for labels
    return labels


def draw_first_token(result: Result, target: Path) -> None:
    figure, [axes] = new_plot()
    for system, measurements in by_system(result).items():
        times = [each["first_token_ms"][0] / 1000 for each in measurements]
        axes.plot([each["clients"] for each in measurements], times, "o-", color=COLOURS[system], label=system)
    plain_numbers(axes)
    axes.set(xlabel="clients at a time", ylabel="time to the first token, p50 (s)")
    clients = sorted({each["clients"] for each in result["measurements"]})
    axes.set_xticks(clients, [str(each) for each in clients])
    axes.xaxis.set_minor_locator(NullLocator())
    save(figure, f"{heading(result)}\nwithout streaming the first token comes with the last", target)


def by_system(result: Result) -> dict[str, list[dict[str, Any]]]:
    """The measurements of each system, by the number of clients."""
    found: dict[str, list[dict[str, Any]]] = {}
    for each in result["measurements"]:
        found.setdefault(each["system"], []).append(each)
    return {system: sorted(each, key=lambda one: int(one["clients"])) for system, each in found.items()}
