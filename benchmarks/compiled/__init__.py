"""Compiled kernels, looked at without a GPU: what each takes of a card, and whether that fits."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.measure.rows import Row, write_rows

# Made again by `make kernels-report` and `make cuda-report`, so not in git.
REPORTS = Path(__file__).parents[2] / "build" / "reports"


def gate(rows: Iterable[Row], path: Path, line: Callable[[Row], str], faults: Callable[[Row], Iterator[str]]) -> int:
    """Print a line for each kernel and target, write the rows, and return the exit status: 1 where one has a fault."""
    kept, broken = [], 0
    for row in rows:
        problems = ", ".join(faults(row))
        print(line(row) + (f"   FAULT: {problems}" if problems else ""), flush=True)
        kept.append(row)
        broken += bool(problems)
    write_rows(path, kept)
    print(f"{len(kept)} kernels, {broken} with faults; wrote {path}")
    return int(broken > 0)
