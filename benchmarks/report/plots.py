"""Result rows as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.measure.rows import Row
from benchmarks.report.tables import by_case, measured, telling, title

# Shown where they were measured, in this order, each with its colour.
SHOWN = {
    "frozen": "#9e9e9e", "peft-lora": "#4c72b0", "hand-lora": "#8da0cb", "unsloth-lora": "#64b5cd",
    "genft-eager": "#2e7d32", "genft-triton": "#55a868", "genft-cuda": "#a5d6a7",
    "official": "#c44e52", "official-compiled": "#e39c9e",
}  # fmt: skip


def draw_cases(rows: Iterable[Row], path: Path) -> bool:
    """Bars, a group for each case: forward and backward relative to PEFT LoRA of rank k; False with nothing to draw.

    Whiskers go from p20 to p80.
    """
    relative = {case: providers for case, each in by_case(rows).items() if (providers := _relative(measured(each)))}
    cases = {case: relative[case] for case in telling(relative)}
    if not cases:
        return False
    names = [name for name in SHOWN if any(name in providers for providers in cases.values())]
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.14 * len(names) * len(cases)), layout="constrained")
    height = 0.84 / len(names)
    for index, name in enumerate(names):
        for group, providers in enumerate(cases.values()):
            if name in providers:
                low, middle, high = providers[name]
                axes.barh(
                    group + (index + 0.5) * height - 0.42, middle, height, color=SHOWN[name],
                    xerr=[[middle - low], [high - middle]], error_kw={"elinewidth": 0.8, "ecolor": "#555555"},
                    label=title(name) if group == next(iter(_groups_of(name, cases))) else None,
                )  # fmt: skip
    axes.set_yticks(range(len(cases)), [_label(case) for case in cases])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(1, color="#4c72b0", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_xlabel("forward + backward, relative to PEFT LoRA of rank k (log scale; less is faster)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def draw_tokens(rows: Iterable[Row], path: Path) -> bool:
    """Lines over the number of tokens, a panel for each (layer, form); False where fewer than three are measured.

    Of several k the smallest is drawn.
    """
    panels: dict[tuple, dict[str, list[tuple[int, float]]]] = {}
    cases = by_case(rows)
    for case, each in cases.items():
        layer, _, _, tokens, dtype, k, form = case
        if k == min(other[5] for other in cases if other[0] == layer and other[6] == form):
            for name, directions in measured(each).items():
                if name in SHOWN and "both" in directions:
                    lines = panels.setdefault((layer, form, dtype, k), {})
                    lines.setdefault(name, []).append((tokens, directions["both"]["time_ms"][1]))
    panels = {key: lines for key, lines in panels.items() if max(map(len, lines.values())) >= 3}
    if not panels:
        return False
    columns = min(3, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        rows_of_panels, columns, squeeze=False, figsize=(4.2 * columns, 3.2 * rows_of_panels + 0.8),
        layout="constrained",
    )  # fmt: skip
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles = {}
    for axes, ((layer, form, dtype, k), lines) in zip(grid.flat, panels.items(), strict=False):
        for name in SHOWN:
            if name in lines:
                tokens, times = zip(*sorted(lines[name]), strict=True)
                handles[name] = axes.loglog(tokens, times, marker="o", markersize=3, color=SHOWN[name])[0]
        axes.set_title(f"{layer}, {form}, {dtype}, k {k}", fontsize=9)
        axes.set_xlabel("tokens")
        axes.set_ylabel("forward + backward, ms")
    figure.legend(handles.values(), [title(name) for name in handles], loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _relative(providers: dict[str, dict[str, Row]]) -> dict[str, Sequence[float]]:
    """By provider, the ratio to PEFT LoRA as (p20, p50, p80)."""
    return {
        name: directions["both"]["ratios"]["peft-lora"]
        for name, directions in providers.items()
        if name in SHOWN and "both" in directions and "peft-lora" in directions["both"]["ratios"]
    }


def _groups_of(name: str, cases: dict[tuple, dict[str, Sequence[float]]]) -> Iterable[int]:
    return (group for group, providers in enumerate(cases.values()) if name in providers)


def _label(case: tuple) -> str:
    layer, n_in, n_out, tokens, dtype, k, form = case
    return f"{layer}\n{n_in} → {n_out}, T {tokens}\n{dtype}, k {k}, {form}"
