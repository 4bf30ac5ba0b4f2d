"""Rows of the suite "experts" as Markdown."""

from collections.abc import Iterable

from benchmarks.measure.rows import Row
from benchmarks.report.tables import grouped, markdown, mebibytes, not_timed, number

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
    """A table for each case, and what was not timed."""
    rows = [{"status": "measured"} | row for row in rows]  # as rows did not say before there was a gate
    measured = [row for row in rows if row["status"] == "measured"]
    parts = [f"#### {_title(found[0])}\n\n{_table(found)}" for found in grouped(measured, *CASE).values()]
    if len(measured) < len(rows):
        parts.append("#### Not timed\n\n" + not_timed(rows, CASE, "method"))
    return "\n".join([INTRODUCTION, *parts])


def _title(row: Row) -> str:
    return (
        f"d {row['hidden']}, m {row['inner']}, {row['experts']} experts, top {row['chosen']}, {row['tokens']} tokens, "
        f"k {row['k']}, {row['dtype']}"
    )


def _table(rows: Iterable[Row]) -> str:
    header = "method", "ms", "× LoRA, grouped", "× LoRA, eager", "trained", "kept MiB", "peak MiB"
    lines = []
    for row in rows:
        ratios = (row.get(name) for name in ("ratio_lora-grouped", "ratio_lora-eager"))
        times = (value and number(value) for value in (row["process_ms"], *ratios))
        memory = (mebibytes(row[name]) for name in ("kept_bytes", "peak_bytes"))
        lines.append((row["method"], *times, f"{row['trained']:,}", *memory))
    return markdown(header, lines)
