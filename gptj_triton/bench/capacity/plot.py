"""Draws what clients of one replica see against the requests a second that come to it."""

from __future__ import annotations

from pathlib import Path

from gptj_triton.bench.capacity.sizing import Plan, Wanted
from gptj_triton.plots import BLUE, GREEN, GREY, ORANGE, RED, Label, new_plot, save


def draw(plan: Plan, wanted: Wanted, title: str, target: Path) -> None:
    """Writes the PNG: the time to the first token above, the time between tokens below."""
    figure, panels = new_plot((8.0, 7.0), panels=2)
    rates = [point.rate for point in plan.points]
    for axes, what, name, limit in (
        (panels[0], "first token", "first_token", wanted.first_token),
        (panels[1], "between tokens", "between_tokens", wanted.between_tokens),
    ):
        for percent, colour in ((50, BLUE), (99, ORANGE)):
            heights = [getattr(getattr(point.seen, name), f"p{percent}") for point in plan.points]
            axes.plot(rates, heights, color=colour, marker=".", label=f"p{percent}")
        if limit < float("inf"):
            axes.axhline(limit, color=RED, linestyle="--", label="wanted, p99")
        axes.axvline(plan.share, color=GREEN, label="the most within it")
        axes.axvline(plan.saturation.requests, color=GREY, linestyle=":", label="saturation")
        axes.set(ylabel=f"{what} (ms)", ylim=(0, None))
    panels[-1].set(xlabel="requests a second to one replica")
    save(figure, title, target, [Label("the knee", plan.share, 0.0, GREEN)])
