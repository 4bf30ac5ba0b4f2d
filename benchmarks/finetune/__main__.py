"""The entry of ``python -m benchmarks.finetune``."""

import argparse
import sys
from pathlib import Path

from .errors import DemoError, require_libraries
from .rates import SWEEP_FILE

DESCRIPTION = """\
Fine-tune a pretrained encoder (MiniLM, 6 layers) on labelled questions with GenFT, with LoRA of equal
trainable size and with a linear probe, all on the same budget; print one table, write comparison.png and
comparison.json; then save the GenFT adapter, load it into a fresh model and merge it, checking the logits
each time."""
EPILOG = """\
examples:
  python -m benchmarks.finetune                                      the whole comparison, minutes on 2 cores
  python -m benchmarks.finetune --train 320 --test 200 --epochs 1    a quick look, under a minute
  python -m benchmarks.finetune --data mine.txt --seeds 0 1 2        your own texts, three runs of each method

exit status: 0; 1 if a run diverges or a check of the saved adapter fails; 2 for something to put right;
130 if interrupted (what had finished is reported all the same)."""


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and return the exit status."""
    try:
        require_libraries()
        from .comparison import compare

        return compare(parse(argv))
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before any method had finished", file=sys.stderr)
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    from .methods import DEFAULT_METHODS
    from .options import add_shared_options

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shared_options(parser, DEFAULT_METHODS)
    parser.add_argument(
        "--rates",
        type=Path,
        default=SWEEP_FILE,
        metavar="FILE",
        help="the sweep's file with the learning rates",
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
