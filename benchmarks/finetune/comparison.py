"""The comparison itself: train every method, report, then carry the adapter through a file."""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from torch import nn

from .encoder import fresh_classifier
from .errors import DemoError
from .options import Inputs, load_inputs, make_repeatable, read_split
from .plot import draw
from .progress import progress_bars
from .rates import read_rates
from .report import as_record, rows_of, table_of, verdict_of, write_json
from .roundtrip import Check, check_adapter
from .training import Budget, Diverged, Run, batch_order, prepare, train

SAVED_METHOD = "fast"
INTERRUPTED = 130


def compare(args: argparse.Namespace) -> int:
    """Do what the options ask for and return the exit status; whatever ends it early, finished runs count."""
    console = Console()
    make_folder(args.output)
    make_repeatable(args.threads)
    split = read_split(args)
    rates = read_rates(args.rates, args.methods)
    inputs = load_inputs(args, split)
    budget = Budget(args.epochs, args.batch_size)
    sizes = f"{len(inputs.train)} to train on, {len(inputs.test)} to test on"
    console.print(f"{inputs.source}: {sizes}, labels {' '.join(inputs.labels)}", highlight=False)

    runs: list[Run] = []
    checks: list[Check] = []
    status, saved = 0, None
    try:
        for run, model in finished_runs(args, rates, inputs, budget, console):
            runs.append(run)
            if run.method == SAVED_METHOD:
                saved = model
        if saved is not None:
            fresh = fresh_classifier(inputs.encoder, len(inputs.labels))
            checks = check_adapter(saved, fresh, inputs.test, args.output / "adapter")
            status = int(not all(check.passed for check in checks))
    except KeyboardInterrupt:
        if not runs:
            raise
        console.print("interrupted; what had finished:")
        status = INTERRUPTED
    except Diverged as error:
        console.print(f"error: {error}; what had finished:" if runs else f"error: {error}")
        status = 1
    except OSError as error:  # the adapter's files, on a full disk
        console.print(f"error: {error}; what had finished:")
        status = 2
    if runs:
        report(args, inputs, budget, console, runs, checks, status)
    return status


def make_folder(folder: Path) -> None:
    """Make sure now, not after minutes of training, that there is a place for the results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DemoError(f"cannot write to the output folder {folder}: {error.strerror}") from error


def finished_runs(
    args: argparse.Namespace, rates: dict[str, float], inputs: Inputs, budget: Budget, console: Console
) -> Iterator[tuple[Run, nn.Module]]:
    """Train every method with every seed; yield each run as it ends, with its model."""
    with progress_bars(console) as start:
        for method in dict.fromkeys(args.methods):
            for seed in dict.fromkeys(args.seeds):
                model = prepare(inputs.encoder, len(inputs.labels), method, seed)
                steps = len(batch_order(len(inputs.train), budget, seed))
                run = train(
                    model,
                    inputs.train,
                    inputs.test,
                    method=method,
                    rate=rates[method],
                    seed=seed,
                    budget=budget,
                    on_step=start(f"{method}, seed {seed}", steps),
                )
                yield run, model


def report(
    args: argparse.Namespace,
    inputs: Inputs,
    budget: Budget,
    console: Console,
    runs: list[Run],
    checks: list[Check],
    status: int,
) -> None:
    """Print the table, the verdict and the checks; write the plot and the JSON."""
    rows = rows_of(runs)
    console.print(table_of(rows))
    for statement, holds in verdict_of(rows):
        console.print(f"{'yes' if holds else 'NO'}: {statement}", highlight=False)
    for check in checks:
        console.print(f"{'passed' if check.passed else 'FAILED'}: {check.what}", highlight=False)
    draw(runs, args.output / "comparison.png")
    record = as_record(
        runs,
        exit_status=status,
        data={
            "source": inputs.source,
            "train": len(inputs.train),
            "test": len(inputs.test),
            "labels": inputs.labels,
        },
        budget=asdict(budget),
        adapter_checks=[asdict(check) for check in checks],
    )
    write_json(args.output / "comparison.json", record)
    console.print(f"written to {args.output}: comparison.png, comparison.json" + (", adapter" if checks else ""))
