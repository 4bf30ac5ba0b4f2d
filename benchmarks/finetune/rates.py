"""Learning rates: chosen by a sweep on a validation part of the training data, kept in its file, read by the demo."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.measure.rows import RUN_FIELDS, Row, read_rows, write_rows

from .data import DemoError

GRID = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
SWEEP_FILE = Path(__file__).with_name("sweep.jsonl")
_KEPT = ("method", "rate", "seed", "status", "reason", "accuracy", "loss", *RUN_FIELDS)


def choose(rows: Iterable[Row]) -> dict[str, float]:
    """The best rate of every method by mean final accuracy over the seeds, then by loss; never one that diverged."""
    results: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        results.setdefault((row["method"], row["rate"]), []).append(row)
    best: dict[str, tuple[float, float, float]] = {}
    for (method, rate), same in results.items():
        if all(row["status"] == "measured" for row in same):
            accuracy, loss = (statistics.mean(row[name][-1] for row in same) for name in ("accuracy", "loss"))
            best[method] = max(best.get(method, (-1.0, 0.0, 0.0)), (round(accuracy, 6), -round(loss, 6), -rate))
    return {method: -rate for method, (_, _, rate) in best.items()}


def write_sweep(path: Path, rows: Sequence[Row]) -> None:
    """Keep a sweep's rows, and print what they choose."""
    write_rows(path, [{name: row[name] for name in _KEPT if name in row} for row in rows])
    for method, rate in choose(rows).items():
        edge = rate in (min(GRID), max(GRID))
        print(f"{method}: rate {rate:g}" + (", at the edge of the grid; widen it" if edge else ""))
    print(f"wrote {path}")


def read_rates(path: Path, methods: Sequence[str]) -> dict[str, float]:
    """The chosen rate of every method in a sweep's file; DemoError names what is missing."""
    try:
        rates = choose(read_rows(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"{path} is not the file of a sweep: {error!r}") from error
    if missing := [method for method in methods if method not in rates]:
        names = " ".join(missing)
        raise DemoError(f"{path} has no rate for {names}; make one: --sweep --methods {names} --rates FILE")
    return rates
