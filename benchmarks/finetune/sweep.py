"""Choose a learning rate for every method on a validation part of the training data, never on the test part.

Run `python -m benchmarks.finetune.sweep`; every method gets the same rates, batches, schedule and seeds.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure.rows import RUN_FIELDS, Row, read_rows, write_rows

from .data import DemoError
from .methods import METHODS
from .runs import add_options, prepare, rows_of
from .training import Job

GRID = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
SWEEP_FILE = Path(__file__).with_name("sweep.jsonl")
_KEPT = ("method", "rate", "seed", "status", "reason", "accuracy", "loss", *RUN_FIELDS)


def main(argv: list[str] | None = None) -> int:
    """Train on the whole grid, write its rows, print the best rates; 2 for something to put right, 130 interrupted."""
    options = parse(argv)
    grid = itertools.product(options.seeds, options.methods, options.rates)
    jobs = (Job(method, rate, seed, options.epochs, options.batch_size) for seed, method, rate in grid)
    try:
        inputs = prepare(options, hold_out=True)
        rows = [{name: row[name] for name in _KEPT if name in row} for row in rows_of(jobs, inputs)]
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    write_rows(options.output, rows)
    for method, rate in choose(rows).items():
        print(f"{method}: rate {rate:g}")
        if rate in (min(options.rates), max(options.rates)):
            print(f"  {method}'s best rate lies at the edge of the grid; widen it")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune.sweep", description=__doc__.splitlines()[0])
    add_options(parser, tuple(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=GRID, metavar="RATE", help="default %(default)s")
    parser.add_argument("--output", type=Path, default=SWEEP_FILE, metavar="FILE", help="default: %(default)s")
    return parser.parse_args(argv)


def choose(rows: Sequence[Row]) -> dict[str, float]:
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


def read_rates(path: Path, methods: Sequence[str]) -> dict[str, float]:
    """The chosen rate of every method in a sweep's file; DemoError names what is missing."""
    try:
        rates = choose(read_rows(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"{path} is not the file of a sweep: {error!r}") from error
    if missing := [method for method in methods if method not in rates]:
        raise DemoError(
            f"{path} has no rate for {', '.join(missing)}; "
            f"make one with: python -m benchmarks.finetune.sweep --methods {' '.join(missing)} --output FILE"
        )
    return rates


if __name__ == "__main__":
    sys.exit(main())
