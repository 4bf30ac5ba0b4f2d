"""`make demo`: fine-tune MiniLM (6 layers) on questions with GenFT and LoRA, and compare them.

GenFT trains as much as LoRA of rank 8, and LoRA of rank 1 is beside it; settings are those that `make compare` chose.
With --task, --data and --model: GLUE, VTAB-1K or FGVC on files of yours, by the official recipe. A row for each run
goes to OUTPUT/<device>/finetune.jsonl.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import command
from benchmarks.measure.environment import device_name
from benchmarks.measure.rows import ResultStore, Row

from . import compare
from .methods import METHODS
from .recipe import Recipe
from .table import SUITE, table
from .tasks import TASKS, DemoError, Problem, glue, pictures
from .training import CPU, Job, Setting

TRAIN_SIZE = 3000
SEEDS = (2,)
# A method and the rank of LoRA whose size it has.
RUNS = (("fast", 8), ("lora", 8), ("lora", 1))
FOLDERS = ("glue", "vtab", "fgvc")
LIBRARIES = ("transformers", "peft")
EPILOG = """\
examples:
  python -m benchmarks.finetune                                      the whole comparison, minutes on 2 cores
  python -m benchmarks.finetune --train 320 --test 200 --epochs 1    a quick look, under a minute
  python -m benchmarks.finetune --seeds 2 3 4                        three runs of each method
  python -m benchmarks.finetune --task glue/cola --data CoLA --model roberta-base --methods official fast
"""


class Inputs(NamedTuple):
    """A problem, how it is trained on, and the settings of its methods."""

    task: str
    problem: Problem
    recipe: Recipe
    rate: float | None  # None: as a sweep chose


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and return the exit status; whatever ends it early, finished runs count."""
    options = parse(argv)
    try:
        inputs = prepare(options)
        print(inputs.problem.data)
        jobs = list(jobs_of(options, inputs))
        rows = (compare.row_of(inputs.task, inputs.problem, job) for job in jobs)
        store = ResultStore.of_command(device_name(CPU), SUITE, compare.CASE, options.output)
        finished: list[Row] = []
        status = command.record((finished.append(row) or row for row in rows), store, lambda row: row["method"])
        print("\n" + table(finished))
        return status
    except (DemoError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def prepare(options: argparse.Namespace) -> Inputs:
    """Make runs repeatable and load what the options ask for.

    Raises:
        DemoError: a library, a package or the data is missing or not as it must be.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise DemoError(f"missing {', '.join(missing)}; install with: pip install {' '.join(missing)}")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    kind, _, name = options.task.partition("/")
    if options.task in TASKS:
        task = TASKS[options.task]
        train_size = options.train or min(TRAIN_SIZE, task.train_size or TRAIN_SIZE)
        problem, recipe, rate = task.load(False, train_size, options.test), task.recipe, None
    elif kind not in FOLDERS or not name:
        raise DemoError(f"--task must be one of {', '.join(TASKS)}, {'/NAME, '.join(FOLDERS)}/NAME")
    elif options.data is None or options.model is None:
        raise DemoError(f"--task {options.task} needs --data DIR and --model DIR")
    elif kind == "glue":
        problem, recipe, rate = glue.load(name, options.data, options.model), glue.RECIPE, glue.RATE
    else:
        problem, recipe, rate = pictures.load(kind, name, options.data, options.model), pictures.RECIPE, pictures.RATE
    recipe = dataclasses.replace(recipe, epochs=options.epochs or recipe.epochs)
    return Inputs(options.task, problem, recipe, options.rate or rate)


def jobs_of(options: argparse.Namespace, inputs: Inputs) -> Iterator[Job]:
    """The runs that the options ask for."""
    names = [(name, 8) for name in dict.fromkeys(options.methods)] if options.methods else RUNS
    for name, rank in names:
        size = inputs.problem.size_of_rank(rank)
        setting = Setting(inputs.rate) if inputs.rate else compare.chosen(options.sweep, inputs.task, name, size)
        for seed in dict.fromkeys(options.seeds):
            yield Job(name, size, setting, seed, inputs.recipe)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser_of("benchmarks.finetune", __doc__, EPILOG, Path("demo-output"))
    number = command.positive(int)
    tasks = f"{', '.join(TASKS)}, glue/{{{','.join(glue.TASKS)}}}, vtab/NAME or fgvc/NAME (default %(default)s)"
    parser.add_argument("--task", default="trec-6", metavar="NAME", help=tasks)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the files of glue, vtab or fgvc")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a saved transformers model, for those")
    parser.add_argument(
        "--train", type=number, metavar="N", help=f"examples (default {TRAIN_SIZE}, or the task's if fewer)"
    )
    parser.add_argument("--test", type=number, metavar="N", help="examples (default: the task's)")
    listing = "; ".join(f"{name}: {method.title}" for name, method in METHODS.items())
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=listing)
    parser.add_argument("--rate", type=command.positive(float), metavar="RATE", help="instead of the chosen one")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="one run each (default 2)")
    parser.add_argument("--epochs", type=number, metavar="N", help="default: the recipe's")
    same = "CPU threads; results repeat exactly only for the same number (default %(default)s)"
    parser.add_argument("--threads", type=number, default=2, metavar="N", help=same)
    parser.add_argument("--sweep", type=Path, default=compare.SWEEP_FILE, metavar="FILE", help="rows of the choice")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
