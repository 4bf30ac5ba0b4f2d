"""`python -m benchmarks.kernel`: each kernel alone beside its floor, and PyTorch's products beside them.

A floor is the larger of two times: the bytes that must move, every operand once, at the card's copy rate; the
multiplications at the rate of a large matrix product of PyTorch's. Both rates are measured first, in the same run.
Times are medians with a cold L2, of a replayed CUDA graph, so a launch costs nothing. Rows go to
benchmarks/results/<device>/kernels.jsonl as they are done.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.kernel.calls import Call, token_side, vendor, weight_side
from benchmarks.layer.cases import DTYPES, LAYERS, SPLITS, Layer
from benchmarks.measure import command, timing
from benchmarks.measure.environment import device_name, environment
from benchmarks.measure.gate import refusal
from benchmarks.measure.rows import ResultStore, Row
from genft_kernels import backends

KEY = ("backend", "kernel", "layer", "tokens", "dtype", "k", "form")
TOKENS = (8192, 1024, 128, 16, 1)
PYTORCH = "pytorch"  # whose products are the factored form's
# From a call to its time in seconds: p20, median, p80.
Clock = Callable[[Callable[[], object]], tuple[float, float, float]]


@dataclasses.dataclass(frozen=True)
class Rates:
    """Limits of a card: bytes copied, read and write counted, and multiplications, in a second."""

    copied_bytes: float
    multiplications: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, clock: Clock, size: int = 8192) -> "Rates":
        """By a copy of `8 size^2` bytes and a product of two random matrices [size, size]."""
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        source = torch.randn(2 * size, size, device=device)
        target, out = torch.empty_like(source), torch.empty_like(left)
        _, copy, _ = clock(lambda: target.copy_(source))
        _, product, _ = clock(lambda: torch.mm(left, right, out=out))
        return cls(2 * source.numel() * source.element_size() / copy, size**3 / product)

    def floor(self, moved_bytes: int, multiplications: int) -> float:
        """Seconds that no kernel stays under."""
        return max(moved_bytes / self.copied_bytes, multiplications / self.multiplications)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which kernels are measured, at which sizes."""

    backends: Sequence[str]
    layers: Sequence[Layer]
    tokens: Sequence[int]
    ks: Sequence[int]

    def calls(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Layer, str, int | None, Call]]:
        """(layer, backend, k, call)."""
        where = dict(dtype=dtype, device=device)
        for layer in self.layers:
            for count in self.tokens:
                yield from ((layer, PYTORCH, k, call) for k, call in vendor(layer, count, self.ks, **where))
            for k, name in itertools.product(self.ks, self.backends):
                kernels = backends.load(name).kernels
                sides = (token_side(kernels, layer, count, k, **where) for count in self.tokens)
                for call in itertools.chain(*sides, weight_side(kernels, layer, k, **where)):
                    yield layer, name, k, call


def measure(sizes: Sizes, dtype: torch.dtype, device: torch.device, rates: Rates, clock: Clock) -> Iterator[Row]:
    """A row keyed by `KEY` for each kernel and size; one that raises gives a row with the reason."""
    fields = environment(device) | {
        "copy_terabytes": round(1e-12 * rates.copied_bytes, 3),
        "product_teraflops": round(2e-12 * rates.multiplications),
    }
    dtype_name = next(name for name, each in DTYPES.items() if each == dtype)
    for layer, name, k, call in sizes.calls(dtype, device):
        key = {
            "backend": name, "kernel": call.kernel, "layer": layer.name, "tokens": call.tokens, "dtype": dtype_name,
            "k": k, "form": call.form,
        }  # fmt: skip
        yield key | _timed(call, rates, clock) | fields


def _timed(call: Call, rates: Rates, clock: Clock) -> Row:
    try:
        times, moved = clock(call.run), call.moved_bytes()
    except Exception as error:
        return refusal(error)
    floor = rates.floor(moved, call.multiplications)
    return {
        "status": "measured", "time_us": [round(1e6 * each, 2) for each in times],
        "floor_us": round(1e6 * floor, 2), "times_floor": round(times[1] / floor, 2),
        "gigabytes_a_second": round(moved / times[1] / 1e9),
        "teraflops": round(2 * call.multiplications / times[1] / 1e12, 1),
    }  # fmt: skip


def _gpu_clock(call: Callable[[], object]) -> tuple[float, float, float]:
    return timing.gpu_times(lambda: call, replay=True)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line for each kernel, and return the exit status: 2 without a GPU."""
    options = _parse(argv)
    if not torch.cuda.is_available():
        print("this machine has no CUDA device that PyTorch can use", file=sys.stderr)
        return 2
    device, dtype = torch.device("cuda"), DTYPES[options.dtype]
    store = ResultStore.of_command(device_name(device), "kernels", KEY, options.output)
    rates = Rates.measured(device, dtype, _gpu_clock)
    print(f"copies: {rates.copied_bytes / 1e12:.2f} TB/s; products: {2 * rates.multiplications / 1e12:.0f} TFLOP/s")
    sizes = Sizes(options.backend, [LAYERS[name] for name in options.layer], options.tokens, options.k)
    return command.record(measure(sizes, dtype, device, rates, _gpu_clock), store, line)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser_of("benchmarks.kernel", __doc__)
    layers = ["llama-7b-qv", "roberta-base-qv", "llama-7b-mlp"]
    parser.add_argument("--backend", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=layers)
    parser.add_argument("--tokens", nargs="+", type=command.positive(int), default=TOKENS, metavar="T")
    parser.add_argument("--k", nargs="+", type=int, choices=SPLITS, default=[26])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    return parser.parse_args(argv)


def line(row: Row) -> str:
    """A row for the terminal."""
    sizes = " ".join(str(row[field]) for field in ("backend", "layer", "tokens", "k", "form") if row[field] is not None)
    start = f"{row['kernel']:16} {sizes:44}"
    if row["status"] != "measured":
        return start
    low, middle, high = row["time_us"]
    return f"{start} {middle:9.1f} us [{low:.1f}, {high:.1f}], {row['times_floor']:.2f} x its floor"


if __name__ == "__main__":
    sys.exit(main())
