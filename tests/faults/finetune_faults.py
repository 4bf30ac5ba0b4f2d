"""Faults in the fine-tuning comparison: the choice, its parts of the data, what is run again, rows, the tables."""

from tests.faults.planting import Fault

COMPARE = ["tests/benchmarks/test_compare.py"]
RESULTS = ["tests/benchmarks/test_benchmark_results.py", "-k", "processes_wait or keep_each"]
RUNS = ["tests/benchmarks/test_finetune.py", "-m", "not slow"]

FAULTS = [
    Fault(
        "comparison: the choice looks at the test part",
        "benchmarks/finetune/tasks/__init__.py",
        "hold_out(parts) if validation else parts",
        "parts",
        COMPARE,
    ),
    Fault(
        "comparison: one seed is enough for the choice",
        "benchmarks/finetune/grid.py",
        '{run["seed"] for run in runs} == set(SEEDS) and ',
        "",
        COMPARE,
    ),
    Fault(
        "comparison: the demonstration's choice is by runs of any length",
        "benchmarks/finetune/compare.py",
        '"method": method} | _fields(TASKS[task].recipe)',
        '"method": method}',
        COMPARE,
    ),
    Fault(
        "comparison: the demonstration's choice is by runs on any data",
        "benchmarks/finetune/compare.py",
        'if row["data"] == rows[-1]["data"]',
        "if True",
        COMPARE,
    ),
    Fault(
        "comparison: differences are not paired by seed",
        "benchmarks/finetune/table.py",
        'theirs[run["seed"]] for run in runs',
        "max(theirs.values()) for run in runs",
        COMPARE,
    ),
    Fault(
        "comparison: runs that are on disk are made again",
        "benchmarks/finetune/compare.py",
        "if self.store.get(_case(task, problem, job)) is None:",
        "if True:",
        COMPARE,
    ),
    Fault(
        "rows: what another process has added is lost",
        "benchmarks/measure/rows.py",
        "for row in upsert_rows(self.path, self.key, rows)}",
        "for row in [*self._rows.values(), *rows]}\n        write_rows(self.path, self._rows.values())",
        RESULTS,
    ),
    Fault(
        "rows: processes do not wait for each other",
        "benchmarks/measure/rows.py",
        "    with only_saver(path.parent):\n",
        "    if True:\n",
        RESULTS,
    ),
    Fault(
        "runs: the scale does not reach LoRA",
        "benchmarks/finetune/methods.py",
        "2 * rank * scale",
        "2 * rank",
        RUNS,
    ),
    Fault(
        "runs: padding counts in the perplexity",
        "benchmarks/finetune/tasks/dialogue.py",
        "padding_value=NO_LABEL",
        "padding_value=0",
        RUNS,
    ),
]
