"""`make demo`: fine-tune MiniLM (6 layers) on labelled questions with GenFT, LoRA and a linear probe, and compare.

Every method gets the same budget, LoRA the trainable size of GenFT. A row for each run goes to
OUTPUT/<device>/finetune.jsonl, a plot beside it; then the GenFT adapter is saved there, loaded into a fresh model and
merged, and the logits are compared each time.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.measure import command
from benchmarks.measure.environment import device_name
from benchmarks.measure.rows import ResultStore, Row

from .data import DemoError
from .encoder import fresh_classifier
from .methods import DEFAULT_METHODS
from .roundtrip import check_adapter
from .runs import CPU, Inputs, add_options, prepare, rows_of
from .sweep import SWEEP_FILE, read_rates
from .table import SUITE, draw, table
from .training import Job

KEY = ("data", "epochs", "batch_size", "method", "seed")
SAVED_METHOD = "fast"
EPILOG = """\
examples:
  python -m benchmarks.finetune                                      the whole comparison, minutes on 2 cores
  python -m benchmarks.finetune --train 320 --test 200 --epochs 1    a quick look, under a minute
  python -m benchmarks.finetune --data mine.txt --seeds 0 1 2        your own texts, three runs of each method
"""


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and return the exit status; whatever ends it early, finished runs count."""
    options = parse(argv)
    try:
        rates = read_rates(options.rates, options.methods)
        inputs = prepare(options)
        store = ResultStore.of_command(device_name(CPU), SUITE, KEY, options.output)
        return compare(options, rates, inputs, store)
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace, rates: dict[str, float], inputs: Inputs, store: ResultStore) -> int:
    """Train every method with every seed, show what came out, and carry the last adapter through a file."""
    print(inputs.title)
    jobs = [
        Job(method, rates[method], seed, options.epochs, options.batch_size)
        for method in dict.fromkeys(options.methods)
        for seed in dict.fromkeys(options.seeds)
    ]
    finished: list[Row] = []
    models = {}
    runs = rows_of(jobs, inputs, models.__setitem__)
    status = command.record((finished.append(row) or row for row in runs), store, lambda row: row["method"])
    measured = [row for row in finished if row["status"] == "measured"]
    if measured:
        print(f"\n{table(measured)}")
        draw(measured, store.path.with_suffix(".png"))
    if SAVED_METHOD in models and status != command.INTERRUPTED:
        fresh = fresh_classifier(inputs.encoder, len(inputs.labels))
        checks = check_adapter(models[SAVED_METHOD], fresh, inputs.test, store.path.with_name("adapter"))
        for check in checks:
            print(f"{'passed' if check.passed else 'FAILED'}: {check.what}")
        status = status or int(not all(check.passed for check in checks))
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser_of("benchmarks.finetune", __doc__, EPILOG)
    parser.set_defaults(output=Path("demo-output"))
    add_options(parser, DEFAULT_METHODS)
    parser.add_argument("--rates", type=Path, default=SWEEP_FILE, metavar="FILE", help="rows of the sweep")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
