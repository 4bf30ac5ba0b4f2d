"""Settings: a grid of the same size for every method, and the choice among its rows on validation loss."""

import itertools
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.measure.rows import Row

from .methods import Method
from .training import Setting

HEAD_RATES = (1e-2, None)
SEEDS = (0, 1)  # of the sweep; the comparison's are others
FINALISTS = 3  # settings that are tried with every seed


def grid(method: Method, head: bool, rate_factor: float = 1.0) -> list[Setting]:
    """A method's settings on a task with or without a head, where all rates but the head's are `rate_factor` times.

    Where everything that trains is a head, it has one rate, and `rates` are as many more.
    """
    heads = HEAD_RATES if head and not method.needs_head else (None,)
    tried = itertools.product(method.scales, heads, method.rates)
    return [Setting(rate_factor * rate / scale, scale, head_rate) for scale, head_rate, rate in tried]


def finalists(rows: Iterable[Row]) -> list[Setting]:
    """The settings with the lowest loss for the first seed, the lowest first; never one that diverged."""
    first = [row for row in rows if row["seed"] == SEEDS[0] and row["status"] == "measured"]
    return [setting_of(row) for row in sorted(first, key=lambda row: row["loss"][-1])[:FINALISTS]]


def choice(rows: Sequence[Row]) -> Setting | None:
    """The setting with the lowest mean loss, among those tried with every seed; None where there is none."""
    results: dict[Setting, list[Row]] = {}
    for row in rows:
        results.setdefault(setting_of(row), []).append(row)
    whole = {
        setting: statistics.mean(run["loss"][-1] for run in runs)
        for setting, runs in results.items()
        if {run["seed"] for run in runs} == set(SEEDS) and all(run["status"] == "measured" for run in runs)
    }
    return min(whole, key=whole.__getitem__, default=None)


def setting_of(row: Row) -> Setting:
    """The setting of a run."""
    return Setting(*(row[name] for name in Setting._fields))
