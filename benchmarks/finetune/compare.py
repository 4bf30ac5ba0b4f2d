"""`make compare`: every method on every task, each with settings chosen on a validation part, over five seeds.

Of each method's grid all settings are tried with one seed and the best three with a second; the lowest mean loss on the
validation part decides. The runs on the test part have other seeds. Every run is a row, on disk as it ends, and is not
made again: those of the choice in SWEEP, those of the tables in OUTPUT/<device>/finetune.jsonl. Several commands may
run side by side, each with --tasks of its own.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.measure import command
from benchmarks.measure.environment import device_name, environment
from benchmarks.measure.gate import refusal
from benchmarks.measure.rows import RUN_FIELDS, ResultStore, Row, read_rows, upsert_rows

from . import grid
from .methods import METHODS, Unsuitable
from .recipe import Recipe
from .table import SUITE, tables
from .tasks import TASKS, DemoError, Problem
from .training import CPU, Diverged, Job, Setting, train

RANKS = (8, 1)  # of LoRA; every method that can trains as many parameters
SEEDS = (2, 3, 4, 5, 6)  # others than those of the choice
SWEEP_FILE = Path(__file__).with_name("sweep.jsonl")
CASE = ("task", "data", "method", "size", *Setting._fields, "seed", "epochs", "batch_size")
_KEPT = (*CASE, "metric", "status", "reason", "score", "loss", *RUN_FIELDS)


class Runs:
    """The runs of a comparison that are on disk, and how the others are made."""

    def __init__(self, sweep: Path, store: ResultStore, epochs: int | None) -> None:
        self.path, self.store, self.epochs = sweep, store, epochs
        self.swept = read_rows(sweep)
        self._problems: dict[tuple[str, bool], Problem] = {}

    def problem(self, task: str, validation: bool) -> Problem:
        """A task's data and model, loaded once."""
        key = (task, validation)
        if key not in self._problems:
            self._problems[key] = TASKS[task].load(validation)
        return self._problems[key]

    def recipe(self, task: str) -> Recipe:
        """How long a task's runs are."""
        recipe = TASKS[task].recipe
        return dataclasses.replace(recipe, epochs=self.epochs or recipe.epochs)

    def of_sweep(self, task: str, method: str, size: int) -> list[Row]:
        """The rows of one method's grid."""
        case = {"task": task, "data": self.problem(task, True).data, "method": method, "size": size}
        case |= _fields(self.recipe(task))
        return _matching(self.swept, case)

    def sweep(self, task: str, job: Job) -> None:
        """Make a run on the validation part unless there is one."""
        rows = self.of_sweep(task, job.method, job.size)
        if (job.setting, job.seed) not in {(grid.setting_of(row), row["seed"]) for row in rows}:
            row = row_of(task, self.problem(task, True), job)
            kept = {name: value for name, value in row.items() if name in _KEPT}
            self.swept = upsert_rows(self.path, CASE, [kept])

    def test(self, task: str, job: Job) -> None:
        """Make a run on the test part unless there is one."""
        problem = self.problem(task, False)
        if self.store.get(_case(task, problem, job)) is None:
            self.store.upsert([row_of(task, problem, job)])


def row_of(task: str, problem: Problem, job: Job) -> Row:
    """A run and its outcome; one that diverges, or has nothing to train, has a status and a reason."""
    fields = environment(CPU) | _case(task, problem, job)
    try:
        return fields | train(job.model(problem), problem, job) | {"status": "measured"}
    except Unsuitable as error:
        return fields | {"status": "unavailable", "reason": str(error)}
    except Diverged as error:
        return fields | refusal(error)


def chosen(path: Path, task: str, method: str, size: int) -> Setting:
    """The setting that a sweep's file has chosen; a size that it has not tried takes that of the largest.

    By runs as long as the task says, and on the data that was swept last: losses of others cannot be compared.

    Raises:
        DemoError: it has none.
    """
    rows = _matching(read_rows(path), {"task": task, "method": method} | _fields(TASKS[task].recipe))
    rows = [row for row in rows if row["data"] == rows[-1]["data"]]
    sizes = {row["size"] for row in rows}
    setting = grid.choice([row for row in rows if row["size"] == (size if size in sizes else max(sizes))])
    if setting is None:
        command_line = f"python -m benchmarks.finetune.compare --tasks {task} --methods {method}"
        raise DemoError(f"{path} has no choice for {method} on {task}; make one: {command_line}, or give --rate")
    return setting


def run(runs: Runs, options: argparse.Namespace) -> None:
    """Make what is missing: the grid with one seed, the best of it with the next, then the test."""
    for task, size, methods in cells(runs, options):
        kind, recipe = TASKS[task], runs.recipe(task)

        def job(method: str, setting: Setting, seed: int, size: int = size, recipe: Recipe = recipe) -> Job:
            return Job(method, size, setting, seed, recipe)

        for method in methods:
            for setting in grid.grid(METHODS[method], kind.head, kind.rate_factor):
                runs.sweep(task, job(method, setting, grid.SEEDS[0]))
        for method in methods:
            for setting in grid.finalists(runs.of_sweep(task, method, size)):
                for seed in grid.SEEDS[1:]:
                    runs.sweep(task, job(method, setting, seed))
        choices = {method: grid.choice(runs.of_sweep(task, method, size)) for method in methods}
        for seed in options.seeds:
            for method, setting in choices.items():
                if setting is not None:
                    runs.test(task, job(method, setting, seed))


def cells(runs: Runs, options: argparse.Namespace) -> Iterator[tuple[str, int, list[str]]]:
    """Tasks and sizes, and the methods that are run there: one that has one size for the first only."""
    for task in options.tasks:
        for number, rank in enumerate(options.ranks):
            fitting = [
                name
                for name in options.methods
                if (METHODS[name].sized or number == 0) and (TASKS[task].head or not METHODS[name].needs_head)
            ]
            yield task, runs.problem(task, True).size_of_rank(rank), fitting


def main(argv: list[str] | None = None) -> int:
    """Make the comparison's missing runs and print its tables; returns the exit status."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    store = ResultStore.of_command(device_name(CPU), SUITE, CASE, options.output)
    try:
        run(Runs(options.sweep, store, options.epochs), options)
    except (DemoError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept", file=sys.stderr)
        return command.INTERRUPTED
    print("\n" + tables(store))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser_of("benchmarks.finetune.compare", __doc__)
    number = command.positive(int)
    for name, known in (("tasks", TASKS), ("methods", METHODS)):
        listing = ", ".join(known)
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=list(known), metavar="NAME", help=listing)
    same_size = "LoRA's, whose size the others have (default 8 1)"
    parser.add_argument("--ranks", nargs="+", type=number, default=RANKS, metavar="R", help=same_size)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="of the test runs")
    parser.add_argument("--epochs", type=number, metavar="N", help="default: the task's")
    parser.add_argument("--threads", type=number, default=1, metavar="N", help="of the CPU (default %(default)s)")
    parser.add_argument("--sweep", type=Path, default=SWEEP_FILE, metavar="FILE", help="rows of the choice")
    return parser.parse_args(argv)


def _case(task: str, problem: Problem, job: Job) -> Row:
    case = {"task": task, "data": problem.data, "metric": problem.metric, "method": job.method, "size": job.size}
    return case | job.setting._asdict() | {"seed": job.seed} | _fields(job.recipe)


def _matching(rows: Iterable[Row], case: Row) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in case.items())]


def _fields(recipe: Recipe) -> Row:
    return {"epochs": recipe.epochs, "batch_size": recipe.batch_size}


if __name__ == "__main__":
    sys.exit(main())
