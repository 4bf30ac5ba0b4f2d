"""`python -m benchmarks.experts`: forward and backward of one block of mixture-of-experts, every method in turns.

Times are of the process, on one thread: methods take turns, and a ratio is the median over the turns of two times of
one turn. Nothing is timed before its output and all its gradients agree with float64. Rows go to
benchmarks/results/<device>/experts.jsonl.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.experts.methods import METHODS, Method, Shape
from benchmarks.experts.workload import of_block
from benchmarks.layer import cases as layer_cases
from benchmarks.measure import command, memory, timing
from benchmarks.measure.environment import device_name, environment
from benchmarks.measure.gate import Expected, refusal
from benchmarks.measure.rows import ResultStore, Row
from benchmarks.measure.workload import Workload

SUITE = "experts"
# What a row of the suite is told apart by.
KEY = ("hidden", "inner", "experts", "chosen", "tokens", "dtype", "k", "method")
DTYPES = ("float32", "bfloat16")
CPU = torch.device("cpu")


def run(methods: Sequence[Method], shape: Shape, dtype_name: str, k: int, turns: int) -> Iterator[Row]:
    """Measure every method, at least `turns` turns: rows keyed by `KEY`.

    Their `status` is as that of `benchmarks.layer.harness.run`.
    """
    case = dataclasses.asdict(shape) | {"dtype": dtype_name, "k": k, "turns": turns, "threads": torch.get_num_threads()}
    case |= environment(CPU)
    counted: dict[str, Row] = {}
    clocks: dict[str, Callable[[], timing.Sample]] = {}
    for method in methods:
        start = case | {"method": method.name}
        try:
            workload = _gated(method, shape, layer_cases.DTYPES[dtype_name], k)
            counted[method.name], clocks[method.name] = start | _counted(workload), _clock(workload)
        except Exception as error:
            yield start | refusal(error)
    samples = timing.take_turns(clocks, seconds=0, least=turns) if clocks else {}
    for name, mine in samples.items():
        ratios = {
            f"ratio_{base}": statistics.median(timing.ratios(mine, other, "both"))
            for base, other in samples.items()
            if base.startswith("lora-")
        }
        times = [sample["both"] for sample in mine]
        yield counted[name] | {"status": "measured", "process_ms": 1e3 * statistics.median(times)} | ratios


def _gated(method: Method, shape: Shape, dtype: torch.dtype, k: int) -> Workload:
    """The block of a method, output and gradients compared with float64; WrongResult where they are off."""
    workload = of_block(method, method.build(shape, dtype, k), shape)
    Expected.of(workload, dtype).check(workload, dtype)
    return workload


def _clock(workload: Workload) -> Callable[[], timing.Sample]:
    both = workload.call("both")
    both()  # warm

    def once() -> timing.Sample:
        start = time.process_time()
        both()
        return {"both": time.process_time() - start}

    return once


def _counted(workload: Workload) -> Row:
    """Figures that are counted rather than timed."""
    trained = [leaf for name, leaf in workload.leaves.items() if name != "x"]
    stacks = [parameter for parameter in workload.frozen if parameter.dim() == 3]
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "stack_bytes": sum(parameter.numel() * parameter.element_size() for parameter in stacks),
        "kept_bytes": memory.kept_bytes(workload.forward, (*workload.frozen, *trained)),
        "peak_bytes": memory.peak_bytes(workload.call("both"), CPU),
    }


def summary(row: Row) -> str:
    """A line to print."""
    text = f"{row['dtype']:9} {row['method']:17}"
    if row["status"] != "measured":
        return text
    mebibyte = 1 << 20
    ratios = "".join(f", {row[name]:.2f} x {name[6:]}" for name in row if name.startswith("ratio_"))
    return (
        f"{text} {row['process_ms']:7.1f} ms{ratios}; trained {row['trained']:,}, "
        f"kept {row['kept_bytes'] / mebibyte:.1f} MiB, peak {row['peak_bytes'] / mebibyte:.1f} MiB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = command.parser_of("benchmarks.experts", __doc__)
    parser.add_argument("--turns", type=command.positive(int), default=20, help="default %(default)s")
    parser.add_argument("--k", type=command.positive(int), default=8, help="units of each expert, default %(default)s")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=command.positive(int), default=field.default)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    chosen = parser.parse_args(arguments)
    if chosen.chosen > chosen.experts:
        parser.error(f"--chosen must be at most --experts, {chosen.experts}; got {chosen.chosen}")
    torch.set_num_threads(1)
    shape = Shape(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Shape)})
    store = ResultStore.of_command(device_name(CPU), SUITE, KEY, chosen.output)
    each = (run(METHODS, shape, dtype_name, chosen.k, chosen.turns) for dtype_name in chosen.dtype)
    return command.record(itertools.chain.from_iterable(each), store, summary)


if __name__ == "__main__":
    sys.exit(main())
