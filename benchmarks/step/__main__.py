"""`make bench-model`: training steps of whole models, every method side by side.

A step is the forward and backward of its micro-batches and AdamW's update; q and v of every layer are adapted. Rows go
to benchmarks/results/<device>/model_step.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler warns of memory that is older than itself

import torch

from benchmarks.layer import third_party
from benchmarks.layer.cases import DTYPES
from benchmarks.measure import arguments, memory, timing
from benchmarks.measure.environment import device_name, environment
from benchmarks.measure.gate import WrongResult
from benchmarks.measure.rows import RESULTS, ResultStore, Row
from benchmarks.report.step_tables import SUITE
from benchmarks.step.methods import METHODS, Method, lora_of
from benchmarks.step.models import MODELS, StepCase, default_cases
from benchmarks.step.training import Step, check, clock

# What a row of the suite is told apart by.
KEY = ("model", "batch", "sequence", "accumulation", "dtype", "method")
# What the others' time is divided by, turn by turn, where it ran.
BASELINES = tuple(name for name in METHODS if name.startswith(("lora-", "official-")))
EPILOG = """\
--model, --dtype and --accumulation choose among the default cases, --batch and --sequence change the size of those.

exit status: 0; 1 if a method's gradients are wrong or it failed; 2 for bad arguments; 130 if interrupted (the rows of
finished cases are kept)."""


def run(methods: Sequence[Method], cases: Sequence[StepCase], device: torch.device, seconds: float) -> Iterator[Row]:
    """Measure the step of every method on every case.

    Args:
        seconds: about how long the clocks of a case run; at least three turns.

    Yields:
        Rows keyed by `KEY`, with a `status`: "measured", or with a `reason` "unavailable" (it cannot run here), "wrong"
        (the gate is red: it is not timed) or "failed" (it raised).
    """
    fields = environment(device) | {"transformers": third_party.version("transformers")}
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
        reason = method.obstacle()
        if reason is not None:
            yield _refusal(case, method, "unavailable", reason)
            continue
        try:
            check(method, case, device)
            step = Step(method, method.build(base), case)
            counted[method.name], steps[method.name] = _counted(step, device), step
        except WrongResult as error:
            yield _refusal(case, method, "wrong", str(error))
        except torch.AcceleratorError:  # the device is lost, and with it the others' run
            raise
        except Exception as error:
            yield _refusal(case, method, "failed", f"{type(error).__name__}: {error}"[:300])
    if not steps:
        return
    samples = timing.take_turns({name: clock(step, device) for name, step in steps.items()}, seconds, least=3)
    for name, step in steps.items():
        yield _measured(step, samples) | counted[name]


def _counted(step: Step, device: torch.device) -> Row:
    """What is counted rather than timed: of one micro-batch, but for the peak, which is the whole step's."""
    kept = memory.kept_bytes(lambda: step.run(1), (*step.model.parameters(), *step.model.buffers()))
    launches = memory.launches(lambda: step.run(1), device)
    peak = memory.peak_bytes(step.run, device) if device.type == "cuda" else None
    per_layer = launches and step.layers and round(launches / step.layers, 1)
    return {"kept_bytes": kept, "peak_bytes": peak, "launches_per_layer": per_layer or None}


def _measured(step: Step, samples: dict[str, list[timing.Sample]]) -> Row:
    case, method, mine = step.case, step.method, samples[step.method.name]
    config = step.model.config
    times = timing.quantiles([sample["step"] for sample in mine])
    bases = {base: timing.ratios(mine, samples[base], "step") for base in BASELINES if base in samples}
    generator = [sample["generator"] for sample in mine]
    generates = step.generations > 0
    shares = timing.ratios([{"step": each} for each in generator], mine, "step")
    return case.key | {
        "method": method.name, "status": "measured", "layers": config.num_hidden_layers, "width": config.hidden_size,
        "adapted_layers": step.layers, "k": method.k, "trained": sum(p.numel() for p in step.trained.values()),
        "time_ms": [round(1e3 * time, 3) for time in times], "samples": len(mine),
        "tokens_per_second": round(case.tokens * case.accumulation / times[1], 1),
        "ratios": {base: [round(each, 4) for each in timing.quantiles(ratios)] for base, ratios in bases.items()},
        "generations": mine[-1]["generations"] if generates else None,
        "generator_ms": round(1e3 * statistics.median(generator) / case.accumulation, 4) if generates else None,
        "generator_share": round(statistics.median(shares), 5) if generates else None,
    }  # fmt: skip


def _refusal(case: StepCase, method: Method, status: str, reason: str) -> Row:
    return case.key | {"method": method.name, "status": status, "k": method.k, "reason": reason}


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line for each row, and return the exit status."""
    options = _parse(argv)
    device = options.device
    print(f"{device_name(device)}: {len(options.cases)} cases, {len(options.methods)} methods")
    if options.list:
        print("\n".join(str(case) for case in options.cases))
        return 0
    store = ResultStore.of_command(device_name(device), SUITE, KEY, options.output)
    red, title = 0, None
    try:
        for row in run(options.methods, options.cases, device, options.seconds):
            store.upsert([row])
            red += row["status"] in ("wrong", "failed")
            if title != (title := " ".join(str(row[field]) for field in KEY[:-1])):
                print(f"\n{title}")
            print(line(row), flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {store.path} has the finished rows", file=sys.stderr)
        return 130
    print(f"\nwrote {store.path}; `make bench-report` shows it")
    return 1 if red else 0


def line(row: Row) -> str:
    """A row for the terminal."""
    start = f"  {row['method']:24}"
    if row["status"] != "measured":
        return f"{start} {row['status']}: {row['reason']}"
    low, middle, high = row["time_ms"]
    text = f"{start} {middle:9.1f} ms [{low:.1f}, {high:.1f}]  {row['tokens_per_second']:8.0f} tokens/s"
    lora = row["ratios"].get(lora_of(row["k"]))
    if lora is not None:
        text += f"  {lora[1]:5.2f} x LoRA"
    if row["generator_ms"] is not None:
        text += f", generator {row['generator_ms']:.2f} ms a micro-batch ({row['generator_share']:.1%})"
    return text


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", nargs="+", choices=METHODS, metavar="NAME", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--model", nargs="+", choices=MODELS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--accumulation", nargs="+", type=arguments.positive(int), metavar="N", help="micro-batches")
    parser.add_argument("--batch", type=arguments.positive(int), metavar="N", help="sequences of a micro-batch")
    parser.add_argument("--sequence", type=arguments.positive(int), metavar="N", help="tokens of a sequence")
    parser.add_argument(
        "--seconds", type=arguments.positive(float), default=8.0,
        help="clock time of a case, in which each method has at least three steps (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", type=arguments.device, default=arguments.default_device())
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    options = parser.parse_args(argv)
    if third_party.version("transformers") is None:
        parser.error("transformers is not installed (pip install transformers)")
    # In the registry's order, whatever the order asked for.
    options.methods = [method for name, method in METHODS.items() if not options.method or name in options.method]
    options.cases = _cases(options)
    if not options.cases:
        chosen = ", ".join(str(case) for case in default_cases(options.device))
        parser.error(f"--model, --dtype and --accumulation match none of the cases: {chosen}")
    fixed = [case.model.name for case in options.cases if case.model.fixed_sequence]
    if options.sequence and fixed:
        parser.error(f"--sequence: {fixed[0]} has {MODELS[fixed[0]].sequence} tokens an image")
    return options


def _cases(options: argparse.Namespace) -> list[StepCase]:
    wanted = {
        "model": options.model and [MODELS[name] for name in options.model],
        "dtype_name": options.dtype, "accumulation": options.accumulation,
    }  # fmt: skip
    sizes = {"batch": options.batch, "sequence": options.sequence}
    changes = {field: value for field, value in sizes.items() if value is not None}
    cases = [
        dataclasses.replace(case, **changes)
        for case in default_cases(options.device)
        if all(getattr(case, field) in values for field, values in wanted.items() if values)
    ]
    return list(dict.fromkeys(cases))


if __name__ == "__main__":
    sys.exit(main())
