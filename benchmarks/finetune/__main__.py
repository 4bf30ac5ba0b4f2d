"""`make demo`: fine-tune MiniLM (6 layers) on labelled questions with GenFT, LoRA and a linear probe, and compare.

Every method gets the same budget, LoRA the trainable size of GenFT. A row for each run goes to
OUTPUT/<device>/finetune.jsonl. `make sweep`: with --sweep, choose the learning rates.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.measure import command
from benchmarks.measure.environment import device_name, environment
from benchmarks.measure.gate import refusal
from benchmarks.measure.rows import ResultStore, Row

from . import data, encoder, rates
from .encoder import Encoded
from .methods import DEFAULT_METHODS, METHODS
from .table import SUITE, table
from .training import CPU, Diverged, Job, train

SEEDS = (2,)  # others than those that chose the rates
KEY = ("data", "epochs", "batch_size", "method", "seed")
LIBRARIES = ("transformers", "peft")
EPILOG = """\
examples:
  python -m benchmarks.finetune                                      the whole comparison, minutes on 2 cores
  python -m benchmarks.finetune --train 320 --test 200 --epochs 1    a quick look, under a minute
  python -m benchmarks.finetune --seeds 2 3 4                        three runs of each method
"""


class Inputs(NamedTuple):
    """A pretrained encoder, encoded examples, and what they are in words."""

    encoder: nn.Module
    labels: list[str]
    train: Encoded
    test: Encoded
    title: str


def main(argv: list[str] | None = None) -> int:
    """Run the comparison or the sweep and return the exit status; whatever ends it early, finished runs count."""
    options = parse(argv)
    try:
        methods = dict.fromkeys(options.methods or DEFAULT_METHODS)
        if options.sweep:
            inputs = prepare(options)
            jobs = rates.grid(methods, options.seeds or rates.SEEDS, options.epochs)
            rates.run_sweep(options.rates, inputs.title, jobs, lambda job: next(rows_of([job], inputs)))
            return 0
        chosen = rates.read_rates(options.rates, list(methods))
        runs = itertools.product(methods, dict.fromkeys(options.seeds or SEEDS))
        jobs = [Job(method, seed=seed, epochs=options.epochs, **chosen[method]._asdict()) for method, seed in runs]
        rows = rows_of(jobs, prepare(options))
        store = ResultStore.of_command(device_name(CPU), SUITE, KEY, options.output)
        finished: list[Row] = []
        status = command.record((finished.append(row) or row for row in rows), store, lambda row: row["method"])
        print("\n" + table(row for row in finished if row["status"] == "measured"))
        return status
    except (data.DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; a sweep keeps its finished runs", file=sys.stderr)
        return command.INTERRUPTED


def prepare(options: argparse.Namespace) -> Inputs:
    """Make runs repeatable and load what the options ask for; for a sweep nothing of the test part.

    Raises:
        DemoError: a library, a data package or the data is missing or not as it must be.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise data.DemoError(f"missing {', '.join(missing)}; install with: pip install {' '.join(missing)}")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    split = data.split(data.read_trec(), options.train, options.test)
    split = data.hold_out(split) if options.sweep else split
    pretrained, tokenizer = encoder.load_pretrained()
    train, test = (Encoded.of(part, split.labels, tokenizer) for part in (split.train, split.test))
    title = f"{data.TREC}: {len(train)} to train on, {len(test)} to test on"
    print(title)
    return Inputs(pretrained, split.labels, train, test, title)


def rows_of(jobs: Iterable[Job], inputs: Inputs) -> Iterator[Row]:
    """A row for each run as it ends; one that diverges has a status and a reason."""
    fields = environment(CPU) | {"data": inputs.title}
    for job in jobs:
        model = job.model(inputs.encoder, len(inputs.labels))
        try:
            row = train(model, inputs.train, inputs.test, job) | {"status": "measured"}
        except Diverged as error:
            row = refusal(error)
        yield vars(job) | fields | row


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser_of("benchmarks.finetune", __doc__, EPILOG, Path("demo-output"))
    number = command.positive(int)
    for part, size in (("train", data.TRAIN_SIZE), ("test", data.TEST_SIZE)):
        parser.add_argument(f"--{part}", type=number, default=size, metavar="N", help="examples (default %(default)s)")
    listing = "; ".join(f"{name}: {title}" for name, (title, _) in METHODS.items())
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=listing)
    seeds = f"one run each (default {SEEDS[0]}; of a sweep {' '.join(map(str, rates.SEEDS))})"
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help=seeds)
    parser.add_argument("--epochs", type=number, default=Job.epochs, metavar="N", help="default %(default)s")
    same = "CPU threads; results repeat exactly only for the same number (default %(default)s)"
    parser.add_argument("--threads", type=number, default=2, metavar="N", help=same)
    sweep = "try every rate that the file of --rates does not have yet, and add it there"
    parser.add_argument("--sweep", action="store_true", help=sweep)
    parser.add_argument("--rates", type=Path, default=rates.SWEEP_FILE, metavar="FILE", help="rows of the sweep")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
