"""Six figures that matter to a user, good and bad: what GenFT costs relative to PEFT's LoRA of the same k."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.layer.providers import BASELINE
from benchmarks.measure.rows import Row
from benchmarks.report import layer_tables, step_tables
from benchmarks.report.tables import markdown
from benchmarks.step.methods import lora_of

STEP_PRESET = "fast"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One case: its title, its suite, and what `by_case` of that suite calls it."""

    title: str
    suite: str
    case: tuple

    def costs(self, rows: dict[str, list[Row]]) -> tuple[float | None, ...] | None:
        """Relative to LoRA: GenFT's fastest backend, the same with H given, the official way; None if not measured.

        A step is that of the preset `STEP_PRESET`, whose layers are generated together: nothing is given.
        """
        tables = layer_tables if self.suite == layer_tables.SUITE else step_tables
        found = tables.by_case(rows.get(self.suite, ())).get(self.case)
        if not found:
            return None
        if self.suite == step_tables.SUITE:
            mine, given, official = found.get(f"genft-{STEP_PRESET}"), None, found.get(f"official-{STEP_PRESET}")
            base = mine and lora_of(mine["k"])
        else:
            mine, given = (layer_tables.fastest(found, part) for part in ("layer", "token side"))
            official, base = found.get("official"), BASELINE
        costs = tuple(
            row["ratios"][base][1] if row and base in row["ratios"] else None for row in (mine, given, official)
        )
        return costs if costs[0] is not None else None


def _layer(title: str, layer: str, size: int, tokens: int, dtype: str, k: int, form: str) -> Bar:
    return Bar(f"one layer, {title}", layer_tables.SUITE, (layer, size, size, tokens, dtype, k, form))


def _step(title: str, model: str, batch: int, dtype: str) -> Bar:
    return Bar(f"whole step, {title}", step_tables.SUITE, (model, batch, 128, 1, dtype))


CPU_BARS = (
    _layer("factored, float32", "roberta-base-qv", 768, 4096, "float32", 26, "factored"),
    _layer("factored, bfloat16", "roberta-base-qv", 768, 4096, "bfloat16", 26, "factored"),
    _layer("tiled, bfloat16", "vit-b16-qv", 768, 4096, "bfloat16", 37, "tiled"),
    _layer("dropout, bfloat16", "roberta-base-qv", 768, 4096, "bfloat16", 26, "dropout"),
    _step("RoBERTa, 4,096 tokens", "roberta-base", 32, "float32"),
    _step("RoBERTa, 128 tokens", "roberta-base", 1, "float32"),
)
GPU_BARS = (
    _layer("LLaMA, factored", "llama-7b-qv", 4096, 8192, "bfloat16", 26, "factored"),
    _layer("LLaMA, tiled", "llama-7b-qv", 4096, 8192, "bfloat16", 26, "tiled"),
    _layer("LLaMA, dropout", "llama-7b-qv", 4096, 8192, "bfloat16", 26, "dropout"),
    _layer("RoBERTa, factored", "roberta-base-qv", 768, 8192, "bfloat16", 26, "factored"),
    _step("LLaMA, 4 layers, 8,192 tokens", "llama-7b-4-layers", 64, "bfloat16"),
    _step("RoBERTa, 8,192 tokens", "roberta-base", 64, "bfloat16"),
)
# A title and what `Bar.costs` gives.
Costs = list[tuple[str, tuple[float | None, ...]]]


def measured(rows: dict[str, list[Row]]) -> Costs:
    """The costs of a device's bars that were measured; `rows` by suite."""
    gpu = any("cuda" in row for row in rows.get(layer_tables.SUITE, ()))
    bars = GPU_BARS if gpu else CPU_BARS
    return [(bar.title, costs) for bar in bars if (costs := bar.costs(rows)) is not None]


def table(devices: Iterable[tuple[str, Costs]]) -> str:
    """The same figures in numbers."""
    lines = [
        (title, device, *(each and f"{each:.2f}" for each in three))
        for device, costs in devices
        for title, three in costs
    ]
    return markdown(("time × PEFT LoRA", "on", "GenFT", "GenFT, update given", "official way"), lines)


def draw(devices: Sequence[tuple[str, Costs]], path: Path) -> None:
    """A panel for each device: bars of GenFT, green where it is the faster, and a diamond for the official way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = [len(costs) for _, costs in devices]
    size = 8, 0.9 + sum(0.6 + 0.42 * count for count in counts)
    figure, grid = pyplot.subplots(
        len(devices), squeeze=False, sharex=True, figsize=size, layout="constrained", height_ratios=counts
    )
    for axes, (device, costs) in zip(grid.flat, devices, strict=True):
        axes.set_title(device, fontsize=9, loc="left")
        for place, (_, (mine, _, official)) in enumerate(costs):
            axes.barh(place, mine, color="#2e7d32" if mine <= 1 else "#b26a00", height=0.6)
            axes.text(mine - 0.03, place, f"{mine:.2f}", va="center", ha="right", color="white", fontsize=8)
            if official is not None:
                axes.plot(official, place, "D", color="#c44e52", markersize=5, label=None if place else "official way")
        axes.set_yticks(range(len(costs)), [title for title, _ in costs], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="#4c72b0", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    grid[-1, 0].set_xlabel("GenFT's cost relative to PEFT's LoRA of the same k (blue line); less is faster", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
