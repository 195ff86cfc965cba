"""Draws what `benchmark_gpu.py` wrote as a roofline: operations a second against operations a byte, below what memory
and matrix units of the GPU allow. Knows neither the engine nor a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# What the rows of a series begin and end with, around its points' labels; its colour; where those labels stand.
SERIES = {
    "decode step, context 128 (batch)": ("decode step, batch ", ", context 128", "tab:blue", (6, -10), 0),
    "decode step, context 512 (batch)": ("decode step, batch ", ", context 512", "tab:green", (-20, 6), 0),
    "first token (prompts x tokens)": ("first token, ", " tokens", "tab:orange", (0, 5), 25),
}


def plot(result: dict[str, Any], peak_tflops: float, target: Path) -> None:
    """Write the PNG; `peak_tflops` is the data sheet's figure for the matrix units, in TFLOP/s."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    bandwidth = result["copy_bandwidth"] / 1e12
    edges = [0.5, peak_tflops / bandwidth, 1e5]
    axes.plot(edges, [min(bandwidth * x, peak_tflops) for x in edges], color="black", label="roof")
    for label, (begin, end, colour, offset, rotation) in SERIES.items():
        rows = [row for row in result["rows"] if row["what"].startswith(begin) and row["what"].endswith(end)]
        intensity = [row["flops"] / row["bytes"] for row in rows]
        speed = [row["flops"] / (row["value"] / 1e3) / 1e12 for row in rows]
        axes.scatter(intensity, speed, color=colour, s=24, label=label)
        for row, x, y in zip(rows, intensity, speed, strict=True):
            name = row["what"].removeprefix(begin).removesuffix(end)
            axes.annotate(name, (x, y), offset, textcoords="offset points", fontsize=7, color=colour, rotation=rotation)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte read (FLOP/byte)", ylabel="speed (TFLOP/s)")
    axes.set_title(
        f"{result['device']}, {result['data_type']}: copy bandwidth {bandwidth:.2f} TB/s, peak {peak_tflops:g} TFLOP/s"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="JSON", help="what benchmark_gpu.py --json wrote")
    parser.add_argument("target", type=Path, metavar="PNG")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.4, help="of the matrix units (default: H100 SXM, fp16)"
    )
    options = parser.parse_args(arguments)
    plot(json.loads(options.result.read_text()), options.peak_tflops, options.target)
    return 0
