"""The runs of a comparison as a table."""

import itertools
import math
import statistics
from collections.abc import Iterable

from benchmarks.measure.rows import Row
from benchmarks.report.tables import markdown

from .methods import METHODS

SUITE = "finetune"


def table(rows: Iterable[Row]) -> str:
    """A line for each method: the mean over its seeds, and their standard deviation; then how sure these are.

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
        rates = f"{first['rate']:g}" + (f", head {first['head_rate']:g}" if first.get("head_rate") else "")
        sizes = f"{first['trainable']:,}", rates, f"{statistics.mean(accuracies):.3f}{spread}"
        lines.append((METHODS[method][0] + rank, *sizes, f"{step:.0f}", f"{peak / 2**20:.0f}"))
    header = ("method", "trainable", "rate", "accuracy", "ms / step", "peak MiB")
    return markdown(header, lines) + _certainty(itertools.chain(*methods.values()))


def _certainty(rows: Iterable[Row]) -> str:
    """What chance there is in an accuracy by the choice of test examples alone, where the rows have their number."""
    shares = [(row["accuracy"][-1], row["tested"]) for row in rows if "tested" in row]
    if not shares:
        return ""
    error = max(math.sqrt(share * (1 - share) / tested) for share, tested in shares)
    return f"\nAn accuracy has a standard error of at most {error:.3f} by the choice of test questions alone.\n"
