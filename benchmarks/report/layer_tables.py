"""Rows of the suite "layer" as Markdown, and how far two runs of it agree."""

import statistics
from collections.abc import Iterable

from benchmarks.layer.cases import DIRECTIONS
from benchmarks.layer.harness import KEY
from benchmarks.layer.providers import BASELINE, PROVIDERS
from benchmarks.measure.rows import Row
from benchmarks.report import tables
from benchmarks.report.tables import markdown, mebibytes, not_timed, number, ratio

SUITE = "layer"
CASE = KEY[:-1]
TOLERANCE = 0.10  # of a ratio between two runs
INTRODUCTION = """\
`make bench`: times are medians of milliseconds, of one layer; "both" is a forward and its backward, gradients for x and
all that trains. A CPU's providers take turns, two calls each of which the faster counts, and a ratio is the median over
the turns of two times of one turn; freed memory stays with the process. A GPU's are timed one after another, each call
with a cold L2, by replay of a CUDA graph up to 1,024 tokens. Nothing is timed before its output and all its gradients
agree with float64 within twice plain PyTorch's error. GenFT's time includes generating the update anew; "H given" is
what a call costs where a model has generated it before (all layers of a shape at once, once an optimizer step under
`accumulate`, once in evaluation).

- **of floor**: the time of the big products alone, which this one cannot do without, over its time: x·Wᵀ and dy·W, and
  for GenFT's tiled form also dyᵀ·x.
- **kept**: what autograd saves for the backward, beside x, W and what trains. **peak**: the most memory at once beyond
  what was there, results included.
- **gain**: how much of an update of a thousandth of W arrives in y and in dx; 1 is all of it.
- **equal parameters**: a LoRA that trains as many parameters over the model as GenFT does with k units.

What the tiled form costs above LoRA can be read from a case's rows. Its three big products, where LoRA has two, take
"of floor" of its time; generation has a row of its own. The rest is sweeps over the update, each an elementwise pass
over tiles of W's size between products of rank k: for W + dW one product and rounding, the same again for dx, and for
the factors' gradients the slope and two more products with a tile of dyᵀ·x. With few tokens generation is the most of
it, in either form: two thin products over W, whatever the tokens. What the factored form takes beside its two big
products, "of floor", is six thin products over the tokens, as in LoRA, and a pass over y and one over dx to add them.
"""


def section(rows: list[Row]) -> str:
    """A line for each of the telling cases, what was not timed, and every provider of each case."""
    titled = [row | {"title": title(row["provider"])} for row in rows]
    parts = [INTRODUCTION, summary(rows), "#### Not timed\n\n" + not_timed(titled, CASE, "title")]
    for case, each in by_case(rows).items():
        layer, n_in, n_out, tokens, dtype, k, form = case
        name = f"{layer} ({n_in} → {n_out}), {tokens} tokens, {dtype}, k {k}, {form}"
        parts.append(f"#### {name}\n\n{_case_table(each)}")
    return "\n".join(parts)


def summary(rows: Iterable[Row]) -> str:
    """Forward and backward of one layer: GenFT's fastest backend beside LoRA and the official way."""
    header = (
        "layer, tokens, dtype, k, form", "PEFT LoRA ms", "GenFT × LoRA", "of floor", "GenFT, H given × LoRA",
        "official × LoRA", "kept MiB: GenFT", "LoRA", "official",
    )  # fmt: skip
    lines, cases = [], by_case(rows)
    for case in telling(cases):
        found = cases[case]
        lora, official, genft = found.get(BASELINE), found.get("official"), fastest(found, "layer")
        if lora is not None and genft is not None:
            layer, _, _, tokens, dtype, k, form = case
            lines.append(
                (
                    f"{layer}, {tokens}, {dtype}, {k}, {form}", number(lora["time_ms"]["both"][1]),
                    ratio(genft, BASELINE), _fraction(genft), ratio(fastest(found, "token side"), BASELINE),
                    ratio(official, BASELINE),
                    *(row and mebibytes(row["kept_bytes"]) for row in (genft, lora, official)),
                )
            )  # fmt: skip
    return markdown(header, lines)


def by_case(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """Measured rows by case and provider."""
    return tables.by_case(rows, KEY, PROVIDERS)


def telling(cases: Iterable[tuple]) -> list[tuple]:
    """All of up to 12 cases; else of each (layer, dtype, form) the one nearest to 8,192 tokens, with the smallest k."""
    cases = list(cases)
    if len(cases) <= 12:
        return cases
    chosen: dict[tuple, tuple] = {}
    for case in sorted(cases, key=lambda case: (abs(case[3] - 8192), case[5])):
        chosen.setdefault((case[0], case[4], case[6]), case)
    return [case for case in cases if case in chosen.values()]


def fastest(found: dict[str, Row], part: str) -> Row | None:
    """GenFT's fastest backend."""
    candidates = [row for name, row in found.items() if name.startswith("genft-") and row["part"] == part]
    return min(candidates, key=lambda row: row["time_ms"]["both"][1], default=None)


def title(provider: str) -> str:
    """A provider's title; its name where the registry no longer has it."""
    return PROVIDERS[provider].title if provider in PROVIDERS else provider


def _case_table(found: dict[str, Row]) -> str:
    header = (
        "provider", "rank", "forward ms", "backward ms", "both ms", "p20 to p80", "× PEFT LoRA", "of floor",
        "kept MiB", "peak MiB", "launches", "gain y / dx",
    )  # fmt: skip
    lines = []
    for name, row in found.items():
        low, _, high = row["time_ms"]["both"]
        lines.append(
            (
                title(name), row["rank"], *(number(row["time_ms"][each][1]) for each in DIRECTIONS),
                f"{number(low)} to {number(high)}", ratio(row, BASELINE), _fraction(row), mebibytes(row["kept_bytes"]),
                mebibytes(row["peak_bytes"]), row["launches"],
                row["gain"] and " / ".join(f"{gain:.2f}" for gain in row["gain"]),
            )
        )  # fmt: skip
    return markdown(header, lines)


def _fraction(row: Row) -> str | None:
    return None if row["floor_fraction"] is None else f"{row['floor_fraction']:.0%}"


def agreement(first: Iterable[Row], second: Iterable[Row]) -> Row:
    """How far the ratios to PEFT's LoRA of two runs lie apart, relative to the smaller.

    Raises:
        ValueError: they have no ratio in common.
    """
    mine, other = (
        {
            tuple(row[field] for field in KEY): row["ratios"][BASELINE][1]
            for row in rows
            if row["provider"] != BASELINE and BASELINE in row.get("ratios", ())
        }
        for rows in (first, second)
    )
    apart = [max(mine[key], other[key]) / min(mine[key], other[key]) - 1 for key in mine if key in other]
    if not apart:
        raise ValueError("the files have no ratio in common")
    within = sum(each <= TOLERANCE for each in apart) / len(apart)
    return {
        "ratios": len(apart), "median": statistics.median(apart), "worst": max(apart), "within_10_percent": within
    }  # fmt: skip
