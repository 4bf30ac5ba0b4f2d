"""Learning rates: chosen by a sweep on a validation part of the training data, kept in its file, read by the demo."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure.rows import RUN_FIELDS, Row, read_rows, write_rows

from .data import DemoError
from .training import Job

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
HEAD_RATES = (1e-2, None)
SEEDS = (0, 1)  # of the sweep; the comparison's are others
SWEEP_FILE = Path(__file__).with_name("sweep.jsonl")
_TOLD_APART_BY = ("data", "epochs", "batch_size", "method", "rate", "head_rate", "shared_lr_factor", "seed")
_KEPT = (*_TOLD_APART_BY, "status", "reason", "accuracy", "loss", *RUN_FIELDS)


class Rates(NamedTuple):
    """What a sweep chooses, as in `Job`."""

    rate: float
    head_rate: float | None = None
    shared_lr_factor: float | None = None


def grid(methods: Iterable[str], seeds: Iterable[int], epochs: int) -> Iterator[Job]:
    """Every run of a sweep: each setting of each method with one seed, then all with the next."""
    for seed, head_rate, rate, method in itertools.product(seeds, HEAD_RATES, RATES, methods):
        yield Job(method, rate, seed, epochs, head_rate=head_rate)


def run_sweep(path: Path, data: str, jobs: Iterable[Job], run: Callable[[Job], Row]) -> None:
    """Make the runs that a sweep's file lacks, on the data of that title, and print what all of them choose.

    Each is on disk as it ends, so that a sweep which was stopped goes on where it was.
    """
    rows = _rows_of_sweep(path)
    done = {_identity(row) for row in rows}
    for job in jobs:
        if _identity({"data": data} | vars(job)) not in done:
            rows.append({name: value for name, value in run(job).items() if name in _KEPT})
            write_rows(path, rows)
    for method, chosen in choose(rows).items():
        print(f"{method}: {chosen}" + ("; at the edge of the grid" if chosen.rate in (min(RATES), max(RATES)) else ""))
    print(f"wrote {path}")


def choose(rows: Iterable[Row]) -> dict[str, Rates]:
    """Each method's best by mean final accuracy over the seeds, then by loss, among those tried with the most seeds.

    Never one that diverged.
    """
    results: dict[str, dict[Rates, list[Row]]] = {}
    for row in rows:
        rates = Rates(row["rate"], row.get("head_rate"), row.get("shared_lr_factor"))
        results.setdefault(row["method"], {}).setdefault(rates, []).append(row)
    best = {}
    for method, tried in results.items():
        seeds = max(map(len, tried.values()))
        whole = {
            rates: _score(same)
            for rates, same in tried.items()
            if len(same) == seeds and all(row["status"] == "measured" for row in same)
        }
        if whole:
            best[method] = max(whole, key=whole.__getitem__)
    return best


def read_rates(path: Path, methods: Sequence[str]) -> dict[str, Rates]:
    """The chosen rates of every method in a sweep's file; DemoError names what is missing."""
    rows = _rows_of_sweep(path)
    try:
        rates = choose(rows)
    except (KeyError, TypeError) as error:
        raise DemoError(f"{path} is not the file of a sweep: {error!r}") from error
    if missing := [method for method in methods if method not in rates]:
        names = " ".join(missing)
        raise DemoError(f"{path} has no rate for {names}; make one: --sweep --methods {names} --rates FILE")
    return rates


def _rows_of_sweep(path: Path) -> list[Row]:
    try:
        return read_rows(path)
    except (OSError, ValueError) as error:
        raise DemoError(f"{path} is not the file of a sweep: {error!r}") from error


def _identity(row: Row) -> tuple:
    return tuple(row.get(name) for name in _TOLD_APART_BY)


def _score(rows: Sequence[Row]) -> tuple[float, float, float]:
    accuracy, loss = (statistics.mean(row[name][-1] for row in rows) for name in ("accuracy", "loss"))
    return round(accuracy, 6), -round(loss, 6), -rows[0]["rate"]
