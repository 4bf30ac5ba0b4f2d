"""Rows of the suite "model_step" as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.measure.rows import Row
from benchmarks.report.tables import markdown, mebibytes, number
from benchmarks.step.methods import METHODS, lora_of

SUITE = "model_step"
_CASE = ("model", "batch", "sequence", "accumulation", "dtype")
_INTRODUCTION = """\
`make bench-model`: forward, backward and AdamW's update, q and v of every layer adapted, random weights, the
backbone's own dropout off. Methods take turns, and a ratio is the median over the turns of two times of one turn;
where methods of a case differ in turns, they were measured in different runs.
"× LoRA" and "kept × LoRA" are to PEFT's LoRA of the same k, "× official" to the official way of the same form.

- **generator**: what generation takes of a step, forward and backward, divided by the micro-batches; share of the step.
- **kept**: what autograd saves of one micro-batch, each storage once, beside parameters.
- **launches**: kernels of one micro-batch and AdamW's update, over the number of adapted layers.

Nothing is timed before the gradients of a tiny model agree with those of the plain model whose weights are W + dW: in
float64 each to 1e-10, and in the case's dtype within twice plain PyTorch's error.
"""


def section(rows: list[Row]) -> str:
    """A table for each case, and what was refused."""
    parts = [_INTRODUCTION]
    for case, found in _by_case(rows).items():
        parts.append(f"#### {_title(case)}\n\n{_table(found)}")
    accumulated = _accumulated(rows)
    if accumulated:
        parts.append("#### The generator under `accumulate`\n\n" + accumulated)
    refused = "".join(
        f"- {_title(tuple(row[field] for field in _CASE))}, {row['method']}: {row['status']}: {row['reason']}\n"
        for row in rows
        if row["status"] != "measured"
    )
    return "\n".join([*parts, refused and "#### Not timed\n\n" + refused])


def summary(rows: list[Row]) -> str:
    """README's table: a line for each case, steps relative to LoRA of the same k."""
    header = (
        "training step: model, tokens, dtype", "LoRA tokens/s", "GenFT `fast`", "GenFT `vtab`", "official `fast`",
        "official `vtab`", "full fine-tuning", "kept, `fast`",
    )  # fmt: skip
    lines = []
    for case, found in _by_case(rows).items():
        if not any(name.startswith("lora-") for name in found):
            continue
        lora = next(row for name, row in found.items() if name.startswith("lora-"))
        full = found.get("full")
        forms = [_shortest(found, f"{way}-{preset}") for way in ("genft", "official") for preset in ("fast", "vtab")]
        lines.append(
            (
                _title(case), number(lora["tokens_per_second"]), *(_ratio(row) for row in forms),
                _ratio(full, lora["method"]), _kept_ratio(forms[0], found),
            )
        )  # fmt: skip
    return markdown(header, lines)


def _shortest(found: dict[str, Row], name: str) -> Row | None:
    """With `accumulate` where the step has several micro-batches."""
    return found.get(f"{name}-accumulate") or found.get(name)


def _by_case(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """Measured rows by case and method, methods in the registry's order."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "measured":
            groups.setdefault(tuple(row[field] for field in _CASE), {})[row["method"]] = row
    order = {name: place for place, name in enumerate(METHODS)}
    return {
        case: dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
        for case, found in groups.items()
    }


def _title(case: tuple) -> str:
    model, batch, sequence, accumulation, dtype = case
    return f"{model}, {f'{accumulation} × ' if accumulation > 1 else ''}{batch} × {sequence}, {dtype}"


def _table(found: dict[str, Row]) -> str:
    header = (
        "method", "trained", "turns", "step ms", "p20 to p80", "tokens/s", "× LoRA", "× official", "generations",
        "generator ms", "share", "kept MiB", "kept × LoRA", "peak MiB", "launches",
    )  # fmt: skip
    lines = []
    for name, row in found.items():
        low, middle, high = row["time_ms"]
        preset = name.split("-")[1] if "-" in name else ""
        share = row["generator_share"]
        lines.append(
            (
                METHODS[name].title if name in METHODS else name, f"{row['trained']:,}", str(row["samples"]),
                number(middle), f"{number(low)} to {number(high)}", number(row["tokens_per_second"]),
                _ratio(row), _ratio(row, f"official-{preset}"), _or_dash(row["generations"]),
                "–" if share is None else number(row["generator_ms"]), "–" if share is None else f"{share:.1%}",
                mebibytes(row["kept_bytes"]), _kept_ratio(row, found), _or_dash(mebibytes(row["peak_bytes"])),
                _or_dash(row["launches_per_layer"]),
            )
        )  # fmt: skip
    sizes = next(iter(found.values()))
    return f"{sizes['layers']} layers, width {sizes['width']}.\n\n" + markdown(header, lines)


def _accumulated(rows: Iterable[Row]) -> str:
    """Its milliseconds for each micro-batch, over those of a step of one micro-batch of the same size."""
    found, lines = _by_case(rows), []
    for case, methods in found.items():
        alone = found.get((*case[:3], 1, case[4]), {})
        for name, row in methods.items():
            one = alone.get(name.removesuffix("-accumulate"))
            if name.endswith("-accumulate") and one is not None:
                share = row["generator_ms"] / one["generator_ms"]
                times = number(one["generator_ms"]), number(row["generator_ms"])
                lines.append((f"{_title(case)}, {METHODS[name].title}", *times, f"1/{1 / share:.1f}"))
    return markdown(("step", "ms of 1 micro-batch alone", "ms a micro-batch", "ratio"), lines) if lines else ""


def _ratio(row: Row | None, base: str | None = None) -> str:
    """To `base`, by default to LoRA of the same k."""
    base = base or (row and lora_of(row["k"]))
    return "–" if row is None or base not in row["ratios"] else f"{row['ratios'][base][1]:.2f}"


def _kept_ratio(row: Row | None, found: dict[str, Row]) -> str:
    lora = row and found.get(lora_of(row["k"]))
    return f"{row['kept_bytes'] / lora['kept_bytes']:.2f}" if lora else "–"


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)
