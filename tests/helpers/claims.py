"""Documents as texts to look for claims in, and the committed rows of accuracy."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.measure.rows import RESULTS, read_rows

ROOT = Path(__file__).parents[2]
ACCURACY = "intel-xeon-processor-1-threads"


def claims(name: str) -> str:
    """A document with its line breaks and quote marks taken out."""
    return re.sub(r"\s+(> )?", " ", (ROOT / name).read_text(encoding="utf-8"))


def accuracy_rows(task: str, size: int) -> list[dict]:
    """Of the comparison of methods, by task and trained parameters."""
    rows = read_rows(RESULTS / ACCURACY / "finetune.jsonl")
    return [row for row in rows if (row["task"], row["size"]) == (task, size)]


def said(text: str, document: str = "README.md") -> None:
    """Fail unless a document has the text."""
    assert text in claims(document), f"{document} says something else by now: look at this test, too"
