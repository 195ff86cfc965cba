"""The losses of a training run, and their plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gptj_triton.plots import new_plot, save


@dataclass
class Curve:
    """Losses in nats a token, one point an epoch; `held_out` is that of the averaged weights."""

    steps_an_epoch: int
    steps: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, step: int, training: float, held_out: float) -> None:
        self.steps.append(step)
        self.training.append(training)
        self.held_out.append(held_out)

    @property
    def best(self) -> int:
        return self.held_out.index(min(self.held_out))

    @property
    def since_best(self) -> int:
        return len(self.held_out) - 1 - self.best


def plot_losses(curve: Curve, path: Path) -> None:
    """Writes the loss curve as a PNG."""
    epochs = [step / curve.steps_an_epoch for step in curve.steps]
    figure, [axes] = new_plot()
    axes.plot(epochs, curve.training, label="training, with dropout, mean of the epoch")
    axes.plot(epochs, curve.held_out, label="held out, averaged weights")
    axes.plot(epochs[curve.best], curve.held_out[curve.best], "o", label=f"kept: {curve.held_out[curve.best]:.3f}")
    axes.set(xlabel="passes over the training text (epochs)", ylabel="loss (nats per token)")
    save(figure, "storyteller", path)
