"""The one style of plots: no label lies over a line, a point or another label, in the committed plots neither."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.path import Path as Line

from gptj_triton.bench.comparison.plots import draw_first_token, draw_throughput, draw_throughput_lines
from gptj_triton.bench.performance_plots import (
    BATCHES,
    CONTEXTS,
    all_bars,
    draw_decode_steps,
    draw_roofline,
    draw_roofline_points,
)
from gptj_triton.bench.results import Result
from gptj_triton.plots import Label, new_plot, place_labels, plain_numbers
from gptj_triton.project import PROJECT

DOCS = PROJECT / "docs"


def committed(name: str) -> Result:
    found: Result = json.loads((DOCS / name).read_text())
    return found


def check_labels(figure: pyplot.Figure, axes: pyplot.Axes, labels: list[Label]) -> None:
    """Every label is there, and alone."""
    boxes = place_labels(figure, axes, labels)
    assert len(boxes) == len(labels)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for line in axes.lines:
        points = axes.transData.transform(line.get_xydata())
        assert not any(Line(points).intersects_bbox(box, filled=False) for box in boxes)
        assert not any(box.contains(x, y) for box in boxes for x, y in points)
    for points in axes.collections:
        for x, y in axes.transData.transform(np.asarray(points.get_offsets())):
            assert not any(box.contains(x, y) for box in boxes)
    pyplot.close(figure)


def test_labels_keep_clear_of_lines_that_cross_and_of_each_other() -> None:
    figure, [axes] = new_plot()
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 1.0, 4.0]
    axes.plot(x, y, "o-")
    axes.plot(x, y[::-1], "o-")
    check_labels(
        figure, axes, [Label(str(8 * i), *point, "black") for i, point in enumerate(zip(x, y, strict=True))] * 2
    )


@pytest.mark.parametrize("name", ["comparison.json", "comparison-h100.json"])
def test_labels_of_the_comparison_lie_over_nothing(name: str) -> None:
    figure, [axes] = new_plot()
    check_labels(figure, axes, draw_throughput_lines(committed(name), axes))


def test_labels_of_the_roofline_lie_over_nothing() -> None:
    figure, [axes] = new_plot()
    check_labels(figure, axes, draw_roofline_points(committed("performance-h100.json"), 989.4, axes))


def test_logarithmic_axes_have_plain_numbers() -> None:
    figure, [axes] = new_plot()
    axes.plot([0.5, 20.0], [100.0, 2000.0])
    plain_numbers(axes)
    figure.canvas.draw()
    assert {"0.5", "20"} <= {text.get_text() for text in axes.get_xticklabels()}
    assert "1,000" in {text.get_text() for text in axes.get_yticklabels()}
    pyplot.close(figure)


def test_every_engine_has_a_bar_for_each_batch_and_context() -> None:
    bars = all_bars(committed("performance-h100.json"), committed("performance-h100-others.json"))
    assert list(bars)[:3] == ["FasterTransformer", "vLLM 0.24", "here"] and list(bars)[3].startswith("floor")
    assert all(set(steps) == set(itertools.product(BATCHES, CONTEXTS)) for steps in bars.values())


def test_the_committed_results_can_be_drawn(tmp_path: Path) -> None:
    gpu, comparison = committed("performance-h100.json"), committed("comparison.json")
    draw_roofline(gpu, 989.4, tmp_path / "roofline.png")
    draw_decode_steps(gpu, committed("performance-h100-others.json"), tmp_path / "decode.png")
    draw_throughput(comparison, tmp_path / "throughput.png")
    draw_first_token(comparison, tmp_path / "first.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4
