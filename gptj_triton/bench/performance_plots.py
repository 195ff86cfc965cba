"""Draws what `benchmark_gpu.py` wrote, in two plots: a roofline (operations a second against operations a byte, below
what memory and matrix units of the GPU allow), and milliseconds a token beside other engines. Knows neither the engine
nor a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from gptj_triton.bench.results import Result
from gptj_triton.plots import BLUE, GREEN, GREY, ORANGE, RED, Label, new_plot, plain_numbers, save

# What the names of a series' measurements begin and end with, around the labels of its points; its colour.
SERIES = {
    "decode step, context 128 (batch)": ("decode step, batch ", ", context 128", BLUE),
    "decode step, context 512 (batch)": ("decode step, batch ", ", context 512", GREEN),
    "first token (prompts x tokens)": ("first token, ", " tokens", ORANGE),
}
CONTEXTS, BATCHES = (128, 512), (1, 8, 32, 64)
OTHER_COLOURS = (RED, ORANGE)
HERE, FLOOR = "here", "floor (weights and KV cache read once)"
BAR_WIDTH = 0.2  # of the distance between two batch sizes

Bars = Mapping[tuple[int, int], float]  # milliseconds by batch and context


def draw_roofline(result: Result, peak_tflops: float, target: Path) -> None:
    """Writes the PNG; `peak_tflops` is the data sheet's figure for the matrix units, in TFLOP/s."""
    figure, [axes] = new_plot()
    labels = draw_roofline_points(result, peak_tflops, axes)
    bandwidth = f"copy bandwidth {result['copy_bandwidth'] / 1e12:.2f} TB/s"
    save(figure, f"{hardware(result)}\n{bandwidth}, peak {peak_tflops:g} TFLOP/s", target, labels)


def draw_roofline_points(result: Result, peak_tflops: float, axes: pyplot.Axes) -> list[Label]:
    """Draws the roof and the points; the labels that belong to the points."""
    bandwidth = result["copy_bandwidth"] / 1e12
    edges = [0.5, peak_tflops / bandwidth, 1e5]
    axes.plot(edges, [min(bandwidth * x, peak_tflops) for x in edges], color="black", label="roof")
    labels = []
    for series, (begin, end, colour) in SERIES.items():
        found = [each for each in result["measurements"] if each["what"].startswith(begin)]
        found = [each for each in found if each["what"].endswith(end)]
        intensity = [each["flops"] / each["bytes"] for each in found]
        speed = [each["flops"] / (each["value"] / 1e3) / 1e12 for each in found]
        axes.scatter(intensity, speed, color=colour, s=24, label=series)
        names = (each["what"].removeprefix(begin).removesuffix(end) for each in found)
        labels += [Label(name, x, y, colour) for name, x, y in zip(names, intensity, speed, strict=True)]
    plain_numbers(axes)
    axes.set(xlabel="operations a byte read (FLOP/byte)", ylabel="speed (TFLOP/s)")
    return labels


def draw_decode_steps(result: Result, others: Result, target: Path) -> None:
    """Writes the PNG: bars of milliseconds a token, a panel for each context, a group for each batch size. `others` has
    the figures of other engines."""
    figure, panels = new_plot((8.0, 7.5), panels=len(CONTEXTS))
    bars = all_bars(result, others)
    colours = [*OTHER_COLOURS[: len(bars) - 2], BLUE, GREY]
    for axes, context in zip(panels, CONTEXTS, strict=True):
        for index, ((name, steps), colour) in enumerate(zip(bars.items(), colours, strict=True)):
            places = [group + (index - (len(bars) - 1) / 2) * BAR_WIDTH for group in range(len(BATCHES))]
            heights = [steps[batch, context] for batch in BATCHES]
            drawn = axes.bar(places, heights, BAR_WIDTH, color=colour, label=name)
            axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
        axes.grid(visible=False, axis="x")
        axes.set_xticks(range(len(BATCHES)), [f"batch {batch}" for batch in BATCHES])
        axes.set(ylabel="ms a token (decode step)")
        axes.set_title(f"context {context}")
        axes.margins(y=0.12)
    save(figure, f"GPT-J 6B's shape, {hardware(result)}", target)


def all_bars(result: Result, others: Result) -> dict[str, Bars]:
    """The decode steps of each engine by its name, and the floor."""
    found: dict[str, Bars] = {
        each["system"]: {(step["batch"], step["context"]): step["ms"] for step in each["decode_steps"]}
        for each in others["systems"]
    }
    steps = {each["what"]: each for each in result["measurements"]}
    for name, key in ((HERE, "value"), (FLOOR, "floor")):
        found[name] = {
            (batch, context): steps[f"decode step, batch {batch}, context {context}"][key]
            for batch in BATCHES
            for context in CONTEXTS
        }
    return found


def hardware(result: Result) -> str:
    return f"{result['machine']}, {result['data_type']}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="JSON", help="what benchmark_gpu.py --json wrote")
    parser.add_argument("others", type=Path, metavar="OTHERS", help="JSON with the figures of other engines")
    parser.add_argument("--roofline", type=Path, required=True, metavar="PNG", help="where to write the roofline")
    parser.add_argument("--decode", type=Path, required=True, metavar="PNG", help="where to write the decode steps")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.4, help="of the matrix units (default: H100 SXM, fp16)"
    )
    options = parser.parse_args(arguments)
    result: dict[str, Any] = json.loads(options.result.read_text())
    draw_roofline(result, options.peak_tflops, options.roofline)
    draw_decode_steps(result, json.loads(options.others.read_text()), options.decode)
    return 0
