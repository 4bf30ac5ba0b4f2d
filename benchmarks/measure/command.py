"""The command line that the measuring commands share: options, and the loop that stores and prints rows."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.measure.rows import RESULTS, ResultStore, Row

INTERRUPTED = 130
EXIT_STATUS = """
exit status: 0; 1 if results are wrong or something failed; 2 for bad arguments; 130 if interrupted (finished rows are
kept)."""


def parser_of(
    module: str, description: str | None, epilog: str = "", output: Path = RESULTS
) -> argparse.ArgumentParser:
    """A parser with the options of every measuring command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, epilog=epilog + EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help=f"default {output.name}")
    return parser


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--device`, by default the GPU if there is one."""
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=_device, default=default, help="default %(default)s")


def add_seconds_option(parser: argparse.ArgumentParser, default: float, of_case: str) -> None:
    """`--seconds`, the clock time of a case."""
    help = f"clock time of a case{of_case} (default %(default)s)"
    parser.add_argument("--seconds", type=positive(float), default=default, help=help)


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type: a finite number above 0, whole where `kind` is int."""

    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    convert.__name__ = "number" if kind is float else "whole number"  # argparse names it where it is none
    return convert


def _device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this PyTorch sees no CUDA device")
    return found


def record(
    rows: Iterable[Row], store: ResultStore, line: Callable[[Row], str], heading: Callable[[Row], str] = lambda row: ""
) -> int:
    """Store and print each row as it comes, a heading wherever it changes; returns the exit status."""
    red, shown = 0, ""
    try:
        for row in rows:
            store.upsert([row])
            red += row.get("status", "measured") not in ("measured", "unavailable")
            if shown != (shown := heading(row)):
                print(f"\n{shown}")
            print(f"{line(row)} {row['status']}: {row['reason']}" if "reason" in row else line(row), flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {store.path} has the finished rows", file=sys.stderr)
        return INTERRUPTED
    print(f"\nwrote {store.path}")
    return int(red > 0)
