"""What the comparison and the sweep share: options, inputs, and a row for each run."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure.command import positive
from benchmarks.measure.environment import environment
from benchmarks.measure.gate import refusal
from benchmarks.measure.rows import Row

from . import data, encoder, training
from .encoder import Encoded
from .methods import METHODS

LIBRARIES = ("transformers", "peft", "matplotlib")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Inputs:
    """A pretrained encoder, encoded examples, and what they are in words."""

    encoder: nn.Module
    labels: list[str]
    train: Encoded
    test: Encoded
    title: str


def add_options(parser: argparse.ArgumentParser, methods: tuple[str, ...]) -> None:
    """Options for data, methods and budget; `methods` is the default choice."""
    number, job = positive(int), training.Job
    parser.add_argument(
        "--data", type=Path, metavar="FILE",
        help="labelled texts, UTF-8, one a line: 'LABEL text of the example'; of a label like NUM:date only NUM counts "
        f"(default: {data.TREC})",
    )  # fmt: skip
    for part, size, share in (("train", data.TRAIN_SIZE, "three quarters"), ("test", data.TEST_SIZE, "a quarter")):
        text = f"{part} examples (default {size}, or {share} of a smaller file)"
        parser.add_argument(f"--{part}", type=number, metavar="N", help=text)
    listing = "; ".join(f"{name}: {method.title}" for name, method in METHODS.items())
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=methods, metavar="NAME", help=listing)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="one run each (default 0)")
    parser.add_argument("--epochs", type=number, default=job.epochs, metavar="N", help="default %(default)s")
    parser.add_argument("--batch-size", type=number, default=job.batch_size, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--threads", type=number, default=2, metavar="N",
        help="CPU threads; results repeat exactly only for the same number (default %(default)s)",
    )  # fmt: skip


def prepare(options: argparse.Namespace, hold_out: bool = False) -> Inputs:
    """Make runs repeatable and load what the options ask for; with `hold_out` nothing of the test part.

    Raises:
        DemoError: a library, a data package or the data is missing or not as it must be.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise data.DemoError(f"missing {', '.join(missing)}; install with: pip install {' '.join(missing)}")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    examples = data.read_examples(options.data) if options.data else data.read_trec()
    split = data.split(examples, options.train, options.test)
    split = data.hold_out(split) if hold_out else split
    tokenizer = encoder.load_tokenizer()
    train, test = (encoder.encode(part, split.labels, tokenizer) for part in (split.train, split.test))
    title = f"{options.data.name if options.data else data.TREC}: {len(train)} to train on, {len(test)} to test on"
    return Inputs(encoder.load_encoder(), split.labels, train, test, title)


def rows_of(
    jobs: Iterable[training.Job], inputs: Inputs, keep: Callable[[str, nn.Module], None] = lambda method, model: None
) -> Iterator[Row]:
    """A row for each run as it ends; its model goes to `keep`. One that diverges has a status and a reason instead."""
    fields = environment(CPU) | {"data": inputs.title}
    for job in jobs:

        def say(text: str, job: training.Job = job) -> None:
            print(f"{job.method}, rate {job.rate:g}, seed {job.seed}: {text}", flush=True)

        row = {"method": job.method, "rate": job.rate, "seed": job.seed} | fields
        row |= {"epochs": job.epochs, "batch_size": job.batch_size}
        model = training.prepare(inputs.encoder, len(inputs.labels), job)
        try:
            row |= training.train(model, inputs.train, inputs.test, job, say) | {"status": "measured"}
            keep(job.method, model)
        except training.Diverged as error:
            row |= refusal(error)
        yield row
