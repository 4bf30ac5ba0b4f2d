"""Learning rates: chosen by the sweep, kept in its file, read by the comparison."""

import json
from collections.abc import Sequence
from pathlib import Path

from .errors import DemoError

SWEEP_FILE = Path(__file__).with_name("sweep.json")


def choose(results: Sequence[dict]) -> dict[str, dict]:
    """The best rate of every method by mean validation accuracy over the seeds, then by validation loss."""
    chosen = {}
    for method in dict.fromkeys(result["method"] for result in results):
        mine = [result for result in results if result["method"] == method]
        candidates = []
        for rate in sorted({result["rate"] for result in mine}):
            same = [result for result in mine if result["rate"] == rate]
            accuracy, loss = (sum(result[key] for result in same) / len(same) for key in ("accuracy", "loss"))
            candidates.append({"rate": rate, "accuracy": round(accuracy, 6), "loss": round(loss, 6)})
        chosen[method] = max(candidates, key=lambda candidate: (candidate["accuracy"], -candidate["loss"]))
    return chosen


def read_rates(path: Path, methods: Sequence[str]) -> dict[str, float]:
    """The chosen rate of every method in a sweep's file; DemoError names what is missing."""
    try:
        chosen = json.loads(path.read_text())["chosen"]
        rates = {method: float(chosen[method]["rate"]) for method in methods if method in chosen}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"{path} is not the file of a sweep: {error!r}") from error
    if missing := [method for method in methods if method not in rates]:
        raise DemoError(
            f"{path} has no rate for {', '.join(missing)}; "
            f"make one with: python -m benchmarks.finetune.sweep --methods {' '.join(missing)} --output FILE"
        )
    return rates
