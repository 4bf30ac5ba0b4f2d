"""Rows of the suite "experts" as Markdown."""

from collections.abc import Iterable

from benchmarks.measure.rows import Row
from benchmarks.report.tables import grouped, markdown, mebibytes, number

SUITE = "experts"
CASE = ("hidden", "inner", "experts", "chosen", "tokens", "dtype", "k")
INTRODUCTION = """\
`python -m benchmarks.experts`: forward and backward of one block of mixture-of-experts, both projections of every
expert adapted, without an optimizer's step. Methods take turns; times are the process's on one thread, because other
work ran on the machine, and a ratio is the median over the turns of two times of one turn. LoRA is PEFT's by
`target_parameters`, of the same k, under transformers' two implementations of experts. Kept is what autograd saves
beside parameters, peak the most that is alive at once.
"""


def section(rows: list[Row]) -> str:
    """A table for each case."""
    cases = grouped(rows, *CASE)
    return "\n".join([INTRODUCTION, *(f"#### {_title(found[0])}\n\n{_table(found)}" for found in cases.values())])


def _title(row: Row) -> str:
    return (
        f"d {row['hidden']}, m {row['inner']}, {row['experts']} experts, top {row['chosen']}, {row['tokens']} tokens, "
        f"k {row['k']}, {row['dtype']}"
    )


def _table(rows: Iterable[Row]) -> str:
    header = "method", "ms", "× LoRA, grouped", "× LoRA, eager", "trained", "kept MiB", "peak MiB"
    lines = []
    for row in rows:
        times = (number(row[name]) for name in ("process_ms", "ratio_lora-grouped", "ratio_lora-eager"))
        memory = (mebibytes(row[name]) for name in ("kept_bytes", "peak_bytes"))
        lines.append((row["method"], *times, f"{row['trained']:,}", *memory))
    return markdown(header, lines)
