"""`make bench`: every provider on every case, side by side; rows go to benchmarks/results/<device>/layer.jsonl."""

import argparse
import itertools
import sys

from benchmarks.layer import harness
from benchmarks.layer.cases import DTYPES, FORMS, LAYERS, SPLITS, Case, default_cases
from benchmarks.layer.providers import BASELINE, PROVIDERS
from benchmarks.measure import command
from benchmarks.measure.environment import environment
from benchmarks.measure.rows import ResultStore, Row

EPILOG = """\
Cases default to a few minutes' worth on a CPU and to the full grid on a GPU; --layer, --tokens, --dtype, --k and --form
keep those that match. Where none does, every combination of what they name is measured; what they leave open is as in
the first default.
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line for each row, and return the exit status."""
    options = _parse(argv)
    fields = environment(options.device)
    store = ResultStore.of_command(fields["device"], "layer", harness.KEY, options.output, writes=not options.list)
    if options.resume:
        done = [harness.is_done(store, options.providers, case, fields["sources"]) for case in options.cases]
        options.cases = [case for case, finished in zip(options.cases, done, strict=True) if not finished]
    print(f"{fields['device']}: {len(options.cases)} cases, {len(options.providers)} providers")
    for name, reason in harness.unavailable(options.providers, options.cases, options.device).items():
        print(f"{name}: unavailable: {reason}")
    if options.list:
        print("\n".join(str(case) for case in options.cases))
        return 0
    rows = harness.run(options.providers, options.cases, options.device, options.seconds)
    return command.record(rows, store, line, lambda row: " ".join(str(row[field]) for field in harness.KEY[:7]))


def line(row: Row) -> str:
    """A row for the terminal."""
    text = f"  {row['provider']:34}"
    for direction, (low, middle, high) in row.get("time_ms", {}).items():
        text += f" {direction} {middle:.3f} ms" + (f" [{low:.3f}, {high:.3f}]" if direction == "both" else "")
    if BASELINE in row.get("ratios", ()):
        text += f"  {row['ratios'][BASELINE][1]:5.2f} x PEFT LoRA"
    return f"{text}, {row['floor_fraction']:.0%} of floor" if row.get("floor_fraction") else text


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser_of("benchmarks.layer", __doc__, EPILOG)
    command.add_device_option(parser)
    names = ", ".join(PROVIDERS)
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, metavar="NAME", help=f"default all: {names}")
    parser.add_argument("--layer", nargs="+", choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=command.positive(int), metavar="T")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--k", nargs="+", type=int, choices=SPLITS)
    parser.add_argument("--form", nargs="+", choices=FORMS)
    command.add_seconds_option(parser, 14.0, " on a CPU")
    parser.add_argument("--resume", action="store_true", help="leave out cases that have all rows of these sources")
    parser.add_argument("--list", action="store_true", help="show the cases and what is unavailable, and stop")
    options = parser.parse_args(argv)
    # In the registry's order, whatever the order asked for.
    options.providers = [each for name, each in PROVIDERS.items() if not options.provider or name in options.provider]
    options.cases = _cases(options)
    return options


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
