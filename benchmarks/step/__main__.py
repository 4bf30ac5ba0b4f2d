"""`make bench-model`: training steps of whole models, every method side by side.

A step is the forward and backward of its micro-batches and AdamW's update; q and v of every layer are adapted, or every
linear layer where the model's name says so. Rows go to benchmarks/results/<device>/model_step.jsonl.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.layer.cases import DTYPES
from benchmarks.measure import command, memory, timing
from benchmarks.measure.environment import device_name, environment, version
from benchmarks.measure.gate import refusal
from benchmarks.measure.rows import ResultStore, Row
from benchmarks.step.methods import COMPILED, METHODS, USUAL, Method, lora_of
from benchmarks.step.models import MODELS, StepCase, default_cases
from benchmarks.step.training import Step, check, clock

SUITE = "model_step"
# What a row of the suite is told apart by.
KEY = ("model", "batch", "sequence", "accumulation", "dtype", "method")
# What the others' time is divided by, turn by turn, where it ran.
BASELINES = tuple(name for name in METHODS if name.startswith(("lora-", "official-", f"{COMPILED}lora-")))


def run(methods: Sequence[Method], cases: Sequence[StepCase], device: torch.device, seconds: float) -> Iterator[Row]:
    """Measure every method's step on every case, at least three turns of it, for about `seconds`: rows keyed by `KEY`.

    Their `status` is as that of `benchmarks.layer.harness.run`.
    """
    fields = environment(device)
    for case in cases:
        meant = [method for method in methods if method.micro_batches <= case.accumulation]
        for row in _run_case(meant, case, device, seconds):
            yield row | fields


def _run_case(methods: Sequence[Method], case: StepCase, device: torch.device, seconds: float) -> Iterator[Row]:
    timing.keep_freed_memory()
    base = case.model.build(device, DTYPES[case.dtype_name])
    steps: dict[str, Step] = {}
    counted: dict[str, Row] = {}
    for method in methods:
        start = case.key | {"method": method.name, "k": method.k}
        reason = method.obstacle()
        if reason is not None:
            yield start | {"status": "unavailable", "reason": reason}
            continue
        try:
            check(method, case, device)
            step = Step(method, method.build(base), case)
            counted[method.name], steps[method.name] = start | _counted(step, device), step
        except Exception as error:
            yield start | refusal(error)
    if not steps:
        return
    samples = timing.take_turns({name: clock(step, device) for name, step in steps.items()}, seconds, least=3)
    for name, step in steps.items():
        yield counted[name] | _measured(step, samples)


def _counted(step: Step, device: torch.device) -> Row:
    """Figures that are counted rather than timed: of one micro-batch, but for the peak, which is the whole step's."""
    config, trained = step.model.config, sum(parameter.numel() for parameter in step.trained.values())
    launches = memory.launches(lambda: step.run(1), device)
    # A graph that somebody listens to is another one.
    kept = None if step.method.compiled else memory.kept_bytes(lambda: step.run(1), _stored(step.model))
    return {
        "layers": config.num_hidden_layers, "width": config.hidden_size, "trained": trained,
        "kept_bytes": kept,
        "peak_bytes": memory.most_bytes(step.run, device),
        "launches_per_layer": round(launches / step.layers, 1) if launches and step.layers else None,
    }  # fmt: skip


def _stored(model: nn.Module) -> tuple[Tensor, ...]:
    return *model.parameters(), *model.buffers()


def _measured(step: Step, samples: dict[str, list[timing.Sample]]) -> Row:
    case, mine = step.case, samples[step.method.name]
    times = timing.quantiles([sample["step"] for sample in mine])
    bases = {base: timing.ratios(mine, samples[base], "step") for base in BASELINES if base in samples}
    row = {
        "status": "measured", "time_ms": [round(1e3 * time, 3) for time in times], "samples": len(mine),
        "tokens_per_second": round(case.tokens * case.accumulation / times[1], 1),
        "ratios": {base: [round(each, 4) for each in timing.quantiles(ratios)] for base, ratios in bases.items()},
        "generations": None, "generator_ms": None, "generator_share": None,
    }  # fmt: skip
    if mine[-1]["generations"] == 0:
        return row
    generator = statistics.median(sample["generator"] for sample in mine)
    return row | {
        "generations": mine[-1]["generations"],
        "generator_ms": round(1e3 * generator / case.accumulation, 4),
        "generator_share": round(statistics.median(sample["generator"] / sample["step"] for sample in mine), 5),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line for each row, and return the exit status."""
    options = _parse(argv)
    device = options.device
    print(f"{device_name(device)}: {len(options.cases)} cases, {len(options.methods)} methods")
    if options.list:
        print("\n".join(str(case) for case in options.cases))
        return 0
    store = ResultStore.of_command(device_name(device), SUITE, KEY, options.output)
    rows = run(options.methods, options.cases, device, options.seconds)
    return command.record(rows, store, line, lambda row: " ".join(str(row[field]) for field in KEY[:-1]))


def line(row: Row) -> str:
    """A row for the terminal."""
    text = f"  {row['method']:24}"
    if row["status"] != "measured":
        return text
    low, middle, high = row["time_ms"]
    text += f" {middle:9.1f} ms [{low:.1f}, {high:.1f}]  {row['tokens_per_second']:8.0f} tokens/s"
    lora = row["ratios"].get(lora_of(row["k"], row["method"]))
    if lora is not None:
        text += f"  {lora[1]:5.2f} x LoRA"
    if row["generator_ms"] is not None:
        text += f", generator {row['generator_ms']:.2f} ms a micro-batch ({row['generator_share']:.1%})"
    return text


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser_of("benchmarks.step", __doc__)
    command.add_device_option(parser)
    others = ", ".join(name for name in METHODS if name not in USUAL)
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, default=USUAL, metavar="NAME",
        help=f"default: {', '.join(USUAL)}; and {others}",
    )  # fmt: skip
    parser.add_argument("--model", nargs="+", choices=MODELS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--accumulation", nargs="+", type=command.positive(int), metavar="N", help="micro-batches")
    command.add_seconds_option(parser, 8.0, ", in which each method has at least three steps")
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    options = parser.parse_args(argv)
    if version("transformers") is None:
        parser.error("transformers is not installed (pip install transformers)")
    # In the registry's order, whatever the order asked for.
    options.methods = [method for name, method in METHODS.items() if name in options.method]
    wanted = {"model": options.model and [MODELS[name] for name in options.model]}
    wanted |= {"dtype_name": options.dtype, "accumulation": options.accumulation}
    cases = default_cases(options.device)
    options.cases = [
        case for case in cases if all(getattr(case, field) in values for field, values in wanted.items() if values)
    ]
    if not options.cases:
        known = "; ".join(str(case) for case in cases)
        parser.error(f"--model, --dtype and --accumulation match none of the cases: {known}")
    return options


if __name__ == "__main__":
    sys.exit(main())
