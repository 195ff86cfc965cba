"""The one style of this project's plots: size, fonts, colours, plain numbers, and labels that never lie over a line.
Knows nothing of what is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path as FilePath
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

RED, ORANGE, BLUE, GREEN, GREY = "tab:red", "tab:orange", "tab:blue", "tab:green", "tab:gray"
SIZE = (8.0, 5.0)  # inches
DPI = 120
TEXT_SIZE, LABEL_SIZE = 9, 8  # points
LEGEND_CHARACTERS = 80  # that fit below a plot in one line
pyplot.rcParams.update(
    {"font.size": TEXT_SIZE} | dict.fromkeys(("axes.titlesize", "figure.titlesize", "legend.fontsize"), TEXT_SIZE)
)
MARKER_RADIUS = 5.0  # pixels around a point that a label leaves free
GAP = 2.0  # pixels between a label and all else


@dataclass(frozen=True)
class Label:
    """A text that belongs to the point (x, y) of the data."""

    text: str
    x: float
    y: float
    colour: str


def new_plot(size: tuple[float, float] = SIZE, panels: int = 1) -> tuple[pyplot.Figure, list[pyplot.Axes]]:
    """An empty figure with `panels` axes, one below the other."""
    figure, axes = pyplot.subplots(panels, figsize=size, layout="constrained", squeeze=False)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return figure, list(axes.flat)


def plain_numbers(axes: pyplot.Axes) -> None:
    """Logarithmic axes with 0.5 and 20 instead of powers of ten."""
    axes.set(xscale="log", yscale="log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())


def save(figure: pyplot.Figure, title: str, target: FilePath, labels: Sequence[Label] = ()) -> None:
    """Writes the PNG with `title` above and a legend below; `labels` are of the first axes. Closes the figure."""
    axes = figure.axes[0]
    figure.suptitle(title)
    handles, names = axes.get_legend_handles_labels()
    lines = 1 + len("".join(names)) // LEGEND_CHARACTERS
    figure.legend(handles, names, loc="outside lower center", ncols=-(-len(names) // lines))
    place_labels(figure, axes, labels)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    pyplot.close(figure)


def place_labels(figure: pyplot.Figure, axes: pyplot.Axes, labels: Sequence[Label]) -> list[Bbox]:
    """Writes each label at the nearest place to its point that no line, point or other label takes; a label without
    such a place is left out. The boxes of those that were written, in pixels."""
    figure.set_dpi(DPI)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # what has been laid out stays where it is
    taken = [axes.transData.transform(points) for points in _lines_and_points(axes)]
    paths = [Path(points) for points in taken]
    boxes = [_around(x, y, MARKER_RADIUS, MARKER_RADIUS) for points in taken for x, y in points]
    written: list[Bbox] = []
    for label in labels:
        text = axes.text(
            label.x, label.y, label.text, color=label.colour, fontsize=LABEL_SIZE, ha="center", va="center"
        )
        extent = text.get_window_extent()
        point = axes.transData.transform((label.x, label.y))
        for dx, dy in _offsets(extent.width / 2, extent.height / 2):
            box = _around(point[0] + dx, point[1] + dy, extent.width / 2 + GAP, extent.height / 2 + GAP)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            inside = inside and axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)
            free = not box.count_overlaps(boxes) and not any(path.intersects_bbox(box, filled=False) for path in paths)
            if inside and free:
                text.set_position(axes.transData.inverted().transform((point[0] + dx, point[1] + dy)))
                boxes.append(box)
                written.append(box)
                break
        else:
            text.remove()
    return written


def _lines_and_points(axes: pyplot.Axes) -> Iterator[Any]:
    """Each line of `axes`, and each of its points by itself, as an array [points, 2] in the data's coordinates."""
    yield from (line.get_xydata() for line in axes.lines)
    for points in axes.collections:
        yield from (point[None] for point in np.asarray(points.get_offsets()))


def _offsets(half_width: float, half_height: float) -> Iterator[tuple[float, float]]:
    """Places around a point for the centre of a box, in pixels, near ones first."""
    angles = [pi / 2 + turn * pi / 8 for turn in (0, 8, 4, -4, 2, -2, 6, -6, 1, -1, 3, -3, 5, -5, 7, -7)]
    for distance, angle in itertools.product((8, 11, 15, 20, 26, 33, 41), angles):
        yield (half_width + distance) * cos(angle), (half_height + distance) * sin(angle)


def _around(x: float, y: float, half_width: float, half_height: float) -> Bbox:
    return Bbox([[x - half_width, y - half_height], [x + half_width, y + half_height]])
