"""The runs of a comparison as tables: mean and deviation over seeds, and how far every method is from LoRA."""

import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.measure.rows import Row
from benchmarks.report.tables import grouped, markdown

from .grid import setting_of
from .methods import METHODS
from .metrics import PERPLEXITY
from .tasks import TASKS

SUITE = "finetune"
BASELINE = "lora"
SUMMARISED = ("fast", "fast-sum")  # the presets to begin with
HEADER = ("method", "trainable", "rate", "last epoch", "best epoch", "− LoRA [95 %]", "CPU ms / step", "peak MiB")
# The 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def tables(rows: Iterable[Row]) -> str:
    """A table for each task, data and number of epochs, with a line for each method and size."""
    return "\n".join(
        f"{data}, {epochs} epochs, {same[0]['metric']}:\n\n{table(same)}"
        for (_, data, epochs), same in grouped(_in_order(rows), "task", "data", "epochs").items()
    )


def summary(rows: Iterable[Row]) -> str:
    """One table of all tasks, with a line for each task and size: LoRA, and the presets to begin with beside it."""
    header, lines = ["fine-tuned by `make compare`: equal size, tuned alike", "PEFT LoRA"], []
    for method in SUMMARISED:
        header += [f"GenFT `{method}`", "− LoRA [95 %]"]
    measured = (row for row in _in_order(rows) if row["status"] == "measured")
    for (task, _, _, size), same in grouped(measured, "task", "data", "epochs", "size").items():
        runs = {method: each for (method,), each in grouped(same, "method").items()}
        if BASELINE in runs and any(method in runs for method in SUMMARISED):
            line = [f"{task}, {size:,} trained, {same[0]['metric']}", _last(runs[BASELINE])]
            for method in SUMMARISED:
                mine = runs.get(method)
                line += [mine and _last(mine), mine and difference(mine, runs[BASELINE])]
            lines.append(line)
    return markdown(header, lines)


def overview(rows: Iterable[Row]) -> str:
    """Every method's last epochs on every task, with the difference to LoRA's: a table for each rank of LoRA."""
    cells: dict[int, dict[str, dict[str, str]]] = {}  # by rank, method and column
    measured = (row for row in _in_order(rows) if row["status"] == "measured")
    for (task, _, _, size), same in grouped(measured, "task", "data", "epochs", "size").items():
        runs = {method: each for (method,), each in grouped(same, "method").items()}
        if BASELINE in runs:
            lines = cells.setdefault(runs[BASELINE][0]["settings"]["r"], {})
            for method, mine in runs.items():
                apart = None if method == BASELINE else mean_difference(mine, runs[BASELINE])
                beside = "" if apart is None else f" ({apart[0]:+.3f} ± {apart[1]:.3f})"
                column = f"{task}, {same[0]['metric']}, {size:,}"
                lines.setdefault(method, {})[column] = f"{_mean(mine):.3f}{beside}"
    parts = []
    for rank, lines in cells.items():
        columns = list(dict.fromkeys(column for line in lines.values() for column in line))
        header = [f"as many trained as by LoRA of rank {rank}", *columns]
        ordered = (method for method in METHODS if method in lines)
        parts.append(markdown(header, ([METHODS[name].title, *map(lines[name].get, columns)] for name in ordered)))
    return "\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """A line for each method and size; then what else chance has in it, and what did not run.

    The best epoch is picked on the part that is judged by, as the official code does. Peak memory is that of one
    forward and backward over the longest examples, beyond weights and optimizer state.
    """
    measured = grouped((row for row in rows if row["status"] == "measured"), "method", "size")
    lines = [_line(runs, measured.get((BASELINE, size), [])) for (_, size), runs in measured.items()]
    others = {(row["method"], row["reason"]): None for row in rows if row["status"] != "measured"}
    notes = [f"- {METHODS[method].title}: {reason}" for method, reason in others]
    return markdown(HEADER, lines) + _certainty(rows) + ("\n" + "\n".join(notes) + "\n" if notes else "")


def _in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of tasks and of methods here, whichever were made first; the larger size before the smaller."""
    tasks, methods = ({name: place for place, name in enumerate(known)} for known in (TASKS, METHODS))
    return sorted(rows, key=lambda row: (tasks.get(row["task"], len(tasks)), -row["size"], methods[row["method"]]))


def _line(runs: Sequence[Row], baseline: Sequence[Row]) -> tuple[str, ...]:
    first = runs[0]
    rank = f", r {first['settings']['r']}" if "r" in first["settings"] else ""
    best = min if first["metric"] == PERPLEXITY else max
    steps = [run["step_cpu_ms"] for run in runs if "step_cpu_ms" in run]
    return (
        METHODS[first["method"]].title + rank,
        f"{first['trainable']:,}",
        str(setting_of(first)),
        _last(runs),
        _spread([best(run["score"]) for run in runs]),
        "" if first["method"] == BASELINE else difference(runs, baseline) or "–",
        f"{statistics.median(steps):.0f}" if steps else "–",
        f"{max(run['peak_bytes'] for run in runs) / 2**20:.0f}",
    )


def difference(runs: Sequence[Row], baseline: Sequence[Row]) -> str | None:
    """The mean of the last epochs' differences by seed, with its 95 % interval; None for less than two in common."""
    apart = mean_difference(runs, baseline)
    return apart and f"{apart[0]:+.3f} [{apart[0] - apart[1]:+.3f}, {apart[0] + apart[1]:+.3f}]"


def mean_difference(runs: Sequence[Row], baseline: Sequence[Row]) -> tuple[float, float] | None:
    """As `difference`, as numbers: the mean and half its interval."""
    theirs = {run["seed"]: run["score"][-1] for run in baseline}
    apart = [run["score"][-1] - theirs[run["seed"]] for run in runs if run["seed"] in theirs]
    if len(apart) < 2:
        return None
    quantile = _QUANTILES[min(len(apart) - 1, len(_QUANTILES)) - 1]
    return statistics.mean(apart), quantile * statistics.stdev(apart) / math.sqrt(len(apart))


def _mean(runs: Iterable[Row]) -> float:
    return statistics.mean(run["score"][-1] for run in runs)


def _last(runs: Iterable[Row]) -> str:
    return _spread([run["score"][-1] for run in runs])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _certainty(rows: Iterable[Row]) -> str:
    """The part of chance in a score by the choice of test examples alone."""
    shares = [
        (row["score"][-1], row["tested"]) for row in rows if row["status"] == "measured" and row["metric"] == "accuracy"
    ]
    if not shares:
        return ""
    error = max(math.sqrt(share * (1 - share) / tested) for share, tested in shares)
    return f"\nAn accuracy has a standard error of at most {error:.3f} by the choice of test examples alone.\n"
