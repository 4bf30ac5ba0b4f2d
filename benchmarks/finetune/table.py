"""The runs of a comparison as a table and a picture."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.measure.rows import Row
from benchmarks.report.tables import markdown

from .methods import METHODS

SUITE = "finetune"


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Runs by the method's title, with a LoRA's rank."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        rank = f", r {row['settings']['r']}" if "r" in row["settings"] else ""
        groups.setdefault(METHODS[row["method"]].title + rank, []).append(row)
    return groups


def table(rows: Iterable[Row]) -> str:
    """A line for each method: the mean over its seeds, and their standard deviation.

    Peak memory is that of one forward and backward over the longest texts, beyond weights and optimizer state.
    """
    lines = []
    for title, runs in by_method(rows).items():
        accuracies = [run["accuracy"][-1] for run in runs]
        spread = f" ± {statistics.stdev(accuracies):.3f}" if len(runs) > 1 else ""
        step, peak = statistics.median(run["step_ms"] for run in runs), max(run["peak_bytes"] for run in runs)
        accuracy = f"{statistics.mean(accuracies):.3f}{spread}"
        sizes = f"{runs[0]['trainable']:,}", f"{runs[0]['rate']:g}"
        lines.append((title, *sizes, accuracy, f"{step:.0f}", f"{peak / 2**20:.0f}"))
    return markdown(("method", "trainable", "rate", "accuracy", "ms / step", "peak MiB"), lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Training loss and test accuracy by epoch, one colour a method, one line a seed."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for (title, runs), colour in zip(by_method(rows).items(), matplotlib.color_sequences["tab10"], strict=False):
        for number, run in enumerate(runs):
            for panel, name in zip(axes, ("training_loss", "accuracy"), strict=True):
                epochs = range(1, len(run[name]) + 1)
                panel.plot(epochs, run[name], marker="o", color=colour, label=None if number else title)
    axes[0].set(xlabel="epoch", ylabel="training loss, mean of the epoch", ylim=(0, None))
    axes[1].set(xlabel="epoch", ylabel="test accuracy")
    for panel in axes:
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)
