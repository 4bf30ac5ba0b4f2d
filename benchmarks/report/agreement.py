"""How well two runs of `make bench` agree: `python -m benchmarks.report.agreement FIRST.jsonl SECOND.jsonl`.

Writes agreement.json beside the first file, where the report finds it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.layer.harness import KEY
from benchmarks.measure.rows import Row, read_rows

TOLERANCE = 0.10


def differences(first: list[Row], second: list[Row], base: str, direction: str) -> dict[tuple, float]:
    """By row, how far the median ratios to `base` of two runs lie apart, relative to the smaller."""
    found = [
        {
            tuple(row[field] for field in KEY): row["ratios"][base][1]
            for row in rows
            if row["direction"] == direction and base in row["ratios"] and row["provider"] != base
        }
        for rows in (first, second)
    ]
    mine, other = found
    return {key: max(mine[key], other[key]) / min(mine[key], other[key]) - 1 for key in mine if key in other}


def main(argv: list[str] | None = None) -> int:
    """Print and write the agreement; 1 where a ratio of forward and backward together is off by more than 10 %."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.agreement", description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args(argv)
    for path in (options.first, options.second):
        if not path.exists():
            parser.error(f"{path} does not exist")
    try:
        first, second = read_rows(options.first), read_rows(options.second)
    except ValueError as error:
        parser.error(str(error))
    found = differences(first, second, "peft-lora", "both")
    if not found:
        parser.error("the files have no ratio in common")
    for key, difference in sorted(found.items(), key=lambda item: -item[1]):
        if difference > TOLERANCE:
            print(f"{difference:6.1%}  {' '.join(str(field) for field in key)}")
    worst = max(found.values())
    summary = {
        "commits": sorted({row["commit"] for row in first + second}, key=str),
        "ratios": len(found), "median": statistics.median(found.values()), "worst": worst,
        "within_10_percent": sum(each <= TOLERANCE for each in found.values()) / len(found),
    }  # fmt: skip
    print(json.dumps(summary))
    (options.first.parent / "agreement.json").write_text(json.dumps(summary) + "\n")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
