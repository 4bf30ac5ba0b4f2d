"""Markdown tables, and what every suite's tables share."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.measure.rows import RUN_FIELDS, Row

_MIB = 1 << 20


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others numbers, and None a dash: a column of them is left out."""
    lines = list(lines)
    kept = [at for at in range(len(header)) if not lines or any(line[at] is not None for line in lines)]
    rule = ["---", *("---:" for _ in header[1:])]
    cells = (["–" if cell is None else str(cell) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line[at] for at in kept) + " |" for line in (header, rule, *cells)) + "\n"


def generic(rows: Sequence[Row]) -> str:
    """Every field but the run's, in the order in which rows have them."""
    fields = dict.fromkeys(field for row in rows for field in row if field not in RUN_FIELDS)
    lines = [[_scalar(row.get(field)) for field in fields] for row in rows]
    return markdown([field.replace("_", " ") for field in fields], lines)


def provenance(rows: Iterable[Row]) -> str:
    """Device, versions and commit that the rows were measured with; several where runs were mixed, or nothing."""
    rows = list(rows)
    found = {field: dict.fromkeys(str(row[field]) for row in rows if row.get(field)) for field in RUN_FIELDS}
    words = {field: " and ".join(values) for field, values in found.items() if values and field != "sources"}
    said = ", ".join(value if name == "device" else f"{name} {value}" for name, value in words.items())
    return f"{said}.\n" if said else ""


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by these fields."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def by_case(rows: Iterable[Row], key: Sequence[str], order: Iterable[str]) -> dict[tuple, dict[str, Row]]:
    """Measured rows by case and by the last field of `key`, names in `order`, cases as they first appear."""
    cases = {}
    for case, same in grouped((row for row in rows if row["status"] == "measured"), *key[:-1]).items():
        found = {row[key[-1]]: row for row in same}
        cases[case] = {name: found[name] for name in [*(each for each in order if each in found), *found]}
    return cases


def not_timed(rows: Iterable[Row], key: Sequence[str], name: str) -> str:
    """A list of what was wrong, failed or unavailable, by `name`, with the reason and in how many cases."""
    rows = list(rows)
    cases = len({tuple(row[field] for field in key) for row in rows})
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["status"] != "measured":
            entry = row[name], f"{row['status']}: {row['reason']}"
            found[entry] = found.get(entry, 0) + 1
    lines = [
        f"- {entry}: {reason}" + ("" if count == cases else f" ({count} cases)")
        for (entry, reason), count in found.items()
    ]
    return "\n".join(lines or ["None."]) + "\n"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(row: Row | None, base: str | None) -> str | None:
    """The median over turns of this time over the base's."""
    return f"{row['ratios'][base][1]:.2f}" if row and base in row["ratios"] else None


def mebibytes(count: int | None) -> str | None:
    """Bytes as MiB."""
    return None if count is None else f"{count / _MIB:.2f}" if count < 10 * _MIB else f"{count / _MIB:.0f}"


def _scalar(value: object) -> object:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_scalar(each)) for each in value)
    return value
