"""`make bench`: every provider on every case, side by side; rows go to benchmarks/results/<device>/layer.jsonl."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Collection
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler warns of memory that is older than itself

from benchmarks.layer import harness
from benchmarks.layer.cases import DIRECTIONS, DTYPES, FORMS, LAYERS, SPLITS, Case, default_cases
from benchmarks.layer.providers import PROVIDERS, Provider
from benchmarks.measure import arguments
from benchmarks.measure.environment import environment
from benchmarks.measure.rows import RESULTS, ResultStore, Row

EPILOG = """\
Cases default to a few minutes' worth on a CPU and to the full grid on a GPU; --layer, --tokens, --dtype, --k and --form
keep those that match. Where none does, every combination of what they name is measured; what they leave open is as in
the first default.

exit status: 0; 1 if a provider's results are wrong or it failed; 2 for bad arguments; 130 if interrupted (the rows of
finished providers are kept)."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line for each row, and return the exit status."""
    options = _parse(argv)
    fields = environment(options.device)
    store = ResultStore.of_command(fields["device"], "layer", harness.KEY, options.output, writes=not options.list)
    if options.resume:
        done = functools.partial(harness.is_done, store, options.providers, sources=fields["sources"])
        options.cases = [case for case in options.cases if not done(case)]
    print(f"{fields['device']}: {len(options.cases)} cases, {len(options.providers)} providers")
    for name, reason in harness.unavailable(options.providers, options.cases, options.device).items():
        print(f"{name}: unavailable: {reason}")
    if options.list:
        print("\n".join(str(case) for case in options.cases))
        return 0
    red = 0
    settings = {"directions": options.direction, "seconds": options.seconds}
    try:
        case = None
        for row in harness.run(options.providers, options.cases, options.device, **settings):
            harness.record(store, row)
            red += row["status"] in ("wrong", "failed")
            if case != (case := [row[field] for field in harness.KEY[:7]]):
                print("\n" + " ".join(str(each) for each in case))
            print(line(row), flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {store.path} has the finished rows", file=sys.stderr)
        return 130
    print(f"\nwrote {store.path}; `make bench-report` draws it")
    return 1 if red else 0


def line(row: Row) -> str:
    """A row for the terminal."""
    start = f"  {row['provider']:34}"
    if row["status"] != "measured":
        return f"{start} {row['status']}: {row['reason']}"
    low, middle, high = row["time_ms"]
    text = f"{start} {row['direction']:8} {middle:9.3f} ms [{low:.3f}, {high:.3f}]"
    if "peft-lora" in row["ratios"]:
        text += f"  {row['ratios']['peft-lora'][1]:5.2f} x PEFT LoRA"
    return text if row["floor_fraction"] is None else f"{text}, {row['floor_fraction']:.0%} of floor"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--provider", nargs="+", metavar="NAME", help=f"default all: {', '.join(PROVIDERS)}")
    parser.add_argument("--layer", nargs="+", choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=arguments.positive(int), metavar="T")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--k", nargs="+", type=int, choices=SPLITS)
    parser.add_argument("--form", nargs="+", choices=FORMS)
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument(
        "--seconds",
        type=arguments.positive(float),
        default=14.0,
        help="clock time of a case on a CPU (default %(default)s)",
    )
    parser.add_argument("--device", type=arguments.device, default=arguments.default_device())
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    parser.add_argument("--resume", action="store_true", help="leave out cases that have all rows of these sources")
    parser.add_argument("--list", action="store_true", help="show the cases and what is unavailable, and stop")
    options = parser.parse_args(argv)
    options.providers = _providers(parser, options.provider)
    options.cases = _cases(options)
    return options


def _providers(parser: argparse.ArgumentParser, names: Collection[str] | None) -> list[Provider]:
    unknown = [name for name in names or () if name not in PROVIDERS]
    if unknown:
        parser.error(f"--provider: no {', '.join(unknown)}; there are {', '.join(PROVIDERS)}")
    # In the registry's order, whatever the order asked for.
    return [provider for name, provider in PROVIDERS.items() if not names or name in names]


def _cases(options: argparse.Namespace) -> list[Case]:
    wanted = {
        "layer": options.layer and [LAYERS[name] for name in options.layer],
        "tokens": options.tokens, "dtype_name": options.dtype, "k": options.k, "form": options.form,
    }  # fmt: skip
    wanted = {field: values for field, values in wanted.items() if values}
    defaults = default_cases(options.device)
    matching = [case for case in defaults if all(getattr(case, field) in wanted[field] for field in wanted)]
    if matching:
        return matching
    choices = [wanted.get(field, [getattr(defaults[0], field)]) for field in Case.__dataclass_fields__]
    return [Case(*each) for each in itertools.product(*choices)]


if __name__ == "__main__":
    sys.exit(main())
