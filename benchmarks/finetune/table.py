"""The runs of a comparison as a table."""

import statistics
from collections.abc import Iterable

from benchmarks.measure.rows import Row
from benchmarks.report.tables import markdown

from .methods import METHODS

SUITE = "finetune"


def table(rows: Iterable[Row]) -> str:
    """A line for each method: the mean over its seeds, and their standard deviation.

    Peak memory is that of one forward and backward over the longest texts, beyond weights and optimizer state.
    """
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    lines = []
    for method, runs in methods.items():
        first, accuracies = runs[0], [run["accuracy"][-1] for run in runs]
        rank = f", r {first['settings']['r']}" if "r" in first["settings"] else ""
        spread = f" ± {statistics.stdev(accuracies):.3f}" if len(runs) > 1 else ""
        step, peak = statistics.median(run["step_ms"] for run in runs), max(run["peak_bytes"] for run in runs)
        sizes = f"{first['trainable']:,}", f"{first['rate']:g}", f"{statistics.mean(accuracies):.3f}{spread}"
        lines.append((METHODS[method][0] + rank, *sizes, f"{step:.0f}", f"{peak / 2**20:.0f}"))
    return markdown(("method", "trainable", "rate", "accuracy", "ms / step", "peak MiB"), lines)
