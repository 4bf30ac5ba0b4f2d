"""The picture of a comparison."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .methods import METHODS
from .training import Run

SMOOTHING = 20  # steps


def draw(runs: Sequence[Run], path: Path) -> None:
    """Training loss by step and test accuracy by epoch, one colour a method, one line a seed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    colours = dict(zip(METHODS, matplotlib.color_sequences["tab10"], strict=False))
    named = set()
    for run in runs:
        label = None if run.method in named else METHODS[run.method].title
        named.add(run.method)
        style = {"color": colours[run.method], "label": label, "linewidth": 1.8}
        loss_axes.plot(range(1, len(run.losses) + 1), running_mean(run.losses), **style)
        per_epoch = len(run.losses) / len(run.evaluations)
        epochs = [evaluation["step"] / per_epoch for evaluation in run.evaluations]
        accuracy_axes.plot(epochs, [evaluation["accuracy"] for evaluation in run.evaluations], marker="o", **style)
    loss_axes.set(xlabel="step", ylabel=f"training loss (mean of {SMOOTHING} steps)", ylim=(0, None))
    accuracy_axes.set(xlabel="epoch", ylabel="test accuracy")
    accuracy_axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(named))
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of the last SMOOTHING values at every position (of fewer at the beginning)."""
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
