"""Choose a learning rate for every method on a validation part of the training data, never on the test part.

Run ``python -m benchmarks.finetune.sweep``; every method gets the same rates, batches, schedule and seeds.
"""

import argparse
import itertools
import sys
from dataclasses import asdict
from pathlib import Path

from .errors import DemoError, require_libraries
from .rates import SWEEP_FILE, choose

GRID = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; the exit status is 0, 2 for something the user can put right, or 130."""
    try:
        require_libraries()
        return run_sweep(parse(argv), sys.argv[1:] if argv is None else argv)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    from .methods import METHODS
    from .options import add_shared_options

    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune.sweep", description=__doc__.splitlines()[0])
    add_shared_options(parser, tuple(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=GRID, metavar="RATE", help="default %(default)s")
    parser.add_argument("--output", type=Path, default=SWEEP_FILE, metavar="FILE", help="default: %(default)s")
    return parser.parse_args(argv)


def run_sweep(args: argparse.Namespace, argv: list[str]) -> int:
    """Train on the whole grid, print the best rates and write everything to ``args.output``."""
    from rich.console import Console

    from .data import hold_out
    from .options import load_inputs, make_repeatable, read_split
    from .progress import progress_bars
    from .report import environment, write_json
    from .training import Budget, Diverged, batch_order, prepare, train

    make_repeatable(args.threads)
    split = hold_out(read_split(args))
    inputs = load_inputs(args, split)
    budget = Budget(args.epochs, args.batch_size)
    console = Console()
    results = []
    with progress_bars(console) as start:
        for seed, method, rate in itertools.product(args.seeds, args.methods, args.rates):
            steps = len(batch_order(len(inputs.train), budget, seed))
            on_step = start(f"{method}, rate {rate:g}, seed {seed}", steps)
            model = prepare(inputs.encoder, len(inputs.labels), method, seed)
            try:
                run = train(
                    model,
                    inputs.train,
                    inputs.test,
                    method=method,
                    rate=rate,
                    seed=seed,
                    budget=budget,
                    on_step=on_step,
                )
                outcome = {key: run.evaluations[-1][key] for key in ("accuracy", "loss")}
            except Diverged:
                outcome = {"accuracy": 0.0, "loss": 1e9}
            results.append({"method": method, "rate": rate, "seed": seed, **outcome})
    chosen = choose(results)
    for method, best in chosen.items():
        console.print(f"{method}: rate {best['rate']:g}, validation accuracy {best['accuracy']:.4f}")
        if best["rate"] in (min(args.rates), max(args.rates)):
            console.print(f"  {method}'s best rate lies at the edge of the grid; widen it", style="yellow")
    content = {
        "format": 1,
        "command": " ".join(["python -m benchmarks.finetune.sweep", *argv]),
        "data": {"source": inputs.source, "train": len(inputs.train), "validation": len(inputs.test)},
        "budget": asdict(budget),
        "environment": environment(),
        "chosen": chosen,
        "results": results,
    }
    write_json(args.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
