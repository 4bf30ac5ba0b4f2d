"""`python -m benchmarks.experts`: forward and backward of one block of mixture-of-experts, every method in turns.

Times are of the process, on one thread: methods take turns, and a ratio is the median over the turns of two times of
one turn. Rows go to benchmarks/results/<device>/experts.jsonl.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from benchmarks.experts.methods import METHODS, Method, Shape
from benchmarks.layer import cases as layer_cases
from benchmarks.measure import command, memory, timing
from benchmarks.measure.environment import device_name, environment
from benchmarks.measure.rows import ResultStore, Row
from benchmarks.step.methods import trained

SUITE = "experts"
# What a row of the suite is told apart by.
KEY = ("hidden", "inner", "experts", "chosen", "tokens", "dtype", "k", "method")
DTYPES = ("float32", "bfloat16")
CPU = torch.device("cpu")


def run(methods: Sequence[Method], shape: Shape, dtype_name: str, k: int, turns: int) -> Iterator[Row]:
    """Measure every method, at least `turns` turns: rows keyed by `KEY`."""
    fields = environment(CPU)
    blocks = {method.name: method.build(shape, layer_cases.DTYPES[dtype_name], k) for method in methods}
    clocks = {name: _clock(block, shape) for name, block in blocks.items()}
    samples = timing.take_turns(clocks, seconds=0, least=turns)
    for name, block in blocks.items():
        times = [sample["both"] for sample in samples[name]]
        row = dataclasses.asdict(shape) | {"dtype": dtype_name, "k": k, "method": name, "turns": turns}
        row |= {"process_ms": 1e3 * statistics.median(times), "threads": torch.get_num_threads()}
        row |= {
            f"ratio_{base}": statistics.median(timing.ratios(samples[name], samples[base], "both"))
            for base in blocks
            if base.startswith("lora-")
        }
        yield row | _counted(block, shape) | fields


def _call(block: nn.Module, shape: Shape):
    """(forward, forward with backward), each a call without arguments."""
    generator = torch.Generator().manual_seed(2)
    dtype = next(parameter for name, parameter in block.named_parameters() if "gate.weight" in name).dtype
    x, slope = (torch.randn(1, shape.tokens, shape.hidden, generator=generator).to(dtype) for _ in range(2))
    leaves = [x.requires_grad_(), *trained(block).values()]
    return lambda: block(x), lambda: torch.autograd.grad(block(x), leaves, slope)


def _clock(block: nn.Module, shape: Shape):
    _, both = _call(block, shape)
    both()  # warm

    def once() -> timing.Sample:
        start = time.process_time()
        both()
        return {"both": time.process_time() - start}

    return once


def _counted(block: nn.Module, shape: Shape) -> Row:
    """Figures that are counted rather than timed."""
    forward, both = _call(block, shape)
    stacks = [p for p in block.parameters() if p.dim() == 3 and not p.requires_grad]
    return {
        "trained": sum(p.numel() for p in trained(block).values()),
        "stack_bytes": sum(p.numel() * p.element_size() for p in stacks),
        "kept_bytes": memory.kept_bytes(forward, tuple(block.parameters())),
        "peak_bytes": memory.peak_bytes(both, CPU),
    }


def summary(row: Row) -> str:
    """A line to print."""
    mebibyte = 1 << 20
    ratios = ", ".join(f"{row[name]:.2f} x {name[6:]}" for name in row if name.startswith("ratio_"))
    return (
        f"{row['dtype']:9} {row['method']:17} {row['process_ms']:7.1f} ms, {ratios}; trained {row['trained']:,}, "
        f"kept {row['kept_bytes'] / mebibyte:.1f} MiB, peak {row['peak_bytes'] / mebibyte:.1f} MiB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = command.parser_of("benchmarks.experts", __doc__)
    parser.add_argument("--turns", type=command.positive(int), default=20, help="default %(default)s")
    parser.add_argument("--k", type=command.positive(int), default=8, help="units of each expert, default %(default)s")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=command.positive(int), default=field.default)
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = Shape(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Shape)})
    store = ResultStore.of_command(device_name(CPU), SUITE, KEY, chosen.output)
    each = (run(METHODS, shape, dtype_name, chosen.k, chosen.turns) for dtype_name in chosen.dtype)
    return command.record(itertools.chain.from_iterable(each), store, summary)


if __name__ == "__main__":
    sys.exit(main())
