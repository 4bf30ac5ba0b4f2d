"""Result rows as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.layer.cases import DIRECTIONS
from benchmarks.layer.providers import PROVIDERS
from benchmarks.measure.rows import Row

CASE_FIELDS = ("layer", "in", "out", "tokens", "dtype", "k", "form")
_MIB = 1 << 20
# Where a row comes from; the same for a whole run, so tables leave it out.
ENVIRONMENT_FIELDS = (
    "device", "commit", "sources", "genft_kernels", "python", "torch", "triton", "peft", "unsloth", "nemo_automodel",
    "transformers", "cuda", "capability", "cpu_capability",
)  # fmt: skip


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


def by_case(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows grouped by `CASE_FIELDS`, in order of first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in CASE_FIELDS), []).append(row)
    return groups


def telling(cases: Iterable[tuple], most: int = 12) -> list[tuple]:
    """All cases where they are few; else of each (layer, dtype, form) the one nearest to 8,192 tokens, smallest k."""
    cases = list(cases)
    if len(cases) <= most:
        return cases
    chosen: dict[tuple, tuple] = {}
    for case in sorted(cases, key=lambda case: (abs(case[3] - 8192), case[5])):
        chosen.setdefault((case[0], case[4], case[6]), case)
    return [case for case in cases if case in chosen.values()]


def case_title(case: tuple) -> str:
    """One case in words."""
    layer, n_in, n_out, tokens, dtype, k, form = case
    return f"{layer} ({n_in} → {n_out}), {tokens} tokens, {dtype}, k {k}, {form}"


def measured(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Measured rows by provider and direction, in the registry's order."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "measured":
            found.setdefault(row["provider"], {})[row["direction"]] = row
    order = list(PROVIDERS)
    known = {name: found[name] for name in order if name in found}
    return known | {name: each for name, each in found.items() if name not in known}


def title(provider: str) -> str:
    """A provider's title; its name where the registry no longer has it."""
    return PROVIDERS[provider].title if provider in PROVIDERS else provider


def case_table(rows: Iterable[Row]) -> str:
    """Every measured provider of one case."""
    header = (
        "provider", "rank", "forward ms", "backward ms", "both ms", "p20 to p80", "× PEFT LoRA", "of floor",
        "kept MiB", "peak MiB", "launches", "gain y / dx",
    )  # fmt: skip
    lines = []
    for provider, directions in measured(rows).items():
        times = [directions[each]["time_ms"] if each in directions else None for each in DIRECTIONS]
        row = directions.get("both") or next(iter(directions.values()))
        spread = times[2] and f"{number(times[2][0])} to {number(times[2][2])}"
        lines.append(
            (
                title(provider), _or_dash(row["rank"]), *(_or_dash(each and number(each[1])) for each in times),
                _or_dash(spread), _or_dash(ratio(row, "peft-lora")), _or_dash(fraction(row)),
                _or_dash(mebibytes(row["kept_bytes"])), _or_dash(mebibytes(row["peak_bytes"])),
                _or_dash(row["launches"]), _gain(row),
            )
        )  # fmt: skip
    return markdown(header, lines)


def refusals(rows: Iterable[Row], statuses: Sequence[str]) -> str:
    """A list of the providers with one of these statuses, their reasons and, where not everywhere, their cases."""
    rows = list(rows)
    everywhere = len(by_case(rows))
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] in statuses:
            case = tuple(row[field] for field in CASE_FIELDS)
            reason = f"{row['status']}: {row['reason']}"
            found.setdefault((row["provider"], reason), []).append(case_title(case))
    return "".join(
        f"- {title(provider)}: {reason}" + ("" if len(cases) == everywhere else f" ({len(cases)} cases)") + "\n"
        for (provider, reason), cases in found.items()
    )


def generic_table(rows: Sequence[Row]) -> str:
    """Rows of another suite: every field but the environment, in the order in which the first row has them."""
    fields = dict.fromkeys(field for row in rows for field in row if field not in ENVIRONMENT_FIELDS)
    lines = [[_or_dash(_scalar(row.get(field))) for field in fields] for row in rows]
    return markdown([field.replace("_", " ") for field in fields], lines)


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(row: Row, base: str) -> str | None:
    """The median over turns of this time over the base's."""
    return f"{row['ratios'][base][1]:.2f}" if base in row["ratios"] else None


def fraction(row: Row) -> str | None:
    """The floor's time over this one's."""
    return None if row["floor_fraction"] is None else f"{row['floor_fraction']:.0%}"


def mebibytes(count: int | None) -> str | None:
    """Bytes as MiB."""
    return None if count is None else f"{count / _MIB:.2f}" if count < 10 * _MIB else f"{count / _MIB:.0f}"


def _gain(row: Row) -> str:
    return "–" if row["gain_y"] is None else f"{row['gain_y']:.2f} / {row['gain_dx']:.2f}"


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)


def _scalar(value: object) -> object:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_scalar(each)) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_scalar(each)}" for name, each in value.items())
    return value
