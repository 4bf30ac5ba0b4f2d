"""A plot of what one layer costs over the number of tokens: GenFT, PEFT's LoRA, and the floor of both."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.layer.providers import BASELINE
from benchmarks.measure.rows import Row
from benchmarks.report import layer_tables

# Milliseconds of a forward and its backward, by tokens.
Line = list[tuple[int, float]]
# By title; a title's place gives its colour.
LINES = ("GenFT", "GenFT, update given", "PEFT LoRA", "floor: the two big products")
COLOURS = ("#b26a00", "#2e7d32", "#4c72b0", "#888888")
FLOOR = "two-product-floor"
# A line has a shape only from so many points on.
LEAST = 3


def sweep(rows: Sequence[Row]) -> tuple[str, dict[str, Line]] | None:
    """(what was measured, its lines) of the layer and form with the most numbers of tokens; None where too few are."""
    cases = layer_tables.by_case(rows)
    by_layer: dict[tuple, dict[int, dict[str, Row]]] = {}
    for (layer, _, _, tokens, dtype, k, form), found in cases.items():
        if BASELINE in found and layer_tables.fastest(found, "layer") is not None:
            by_layer.setdefault((layer, dtype, k, form), {})[tokens] = found
    if not by_layer:
        return None
    (layer, dtype, k, form), points = max(by_layer.items(), key=lambda item: len(item[1]))
    if len(points) < LEAST:
        return None
    lines: dict[str, Line] = {title: [] for title in LINES}
    for tokens, found in sorted(points.items()):
        genft, given = (layer_tables.fastest(found, part) for part in ("layer", "token side"))
        for title, row in zip(LINES, (genft, given, found[BASELINE], found.get(FLOOR)), strict=True):
            if row is not None:
                lines[title].append((tokens, row["time_ms"]["both"][1]))
    return f"{layer}, {dtype}, k {k}, {form}", lines


def draw(devices: Sequence[tuple[str, tuple[str, dict[str, Line]]]], path: Path) -> None:
    """A panel for each device: time over tokens, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, len(devices), squeeze=False, figsize=(5.5 * len(devices), 4), layout="constrained"
    )
    for axes, (device, (title, lines)) in zip(grid.flat, devices, strict=True):
        axes.set_title(f"{device}\n{title}", fontsize=9, loc="left")
        for colour, (name, points) in zip(COLOURS, lines.items(), strict=True):
            if points:
                style = "--" if name == LINES[-1] else "o-"
                axes.loglog(*zip(*points, strict=True), style, color=colour, label=name, markersize=4)
        axes.set_xlabel("tokens", fontsize=9)
        axes.set_ylabel("ms, forward and backward of one layer", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
