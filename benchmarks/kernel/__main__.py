"""`python -m benchmarks.kernel`: each kernel alone beside its floor, and the ways of `linear` beside each other.

A floor is the larger of two times: the bytes that must move, every operand once, at the card's copy rate; the
multiplications at the rate of a large matrix product of PyTorch's. Both rates are measured first, in the same run.
Times are medians with a cold L2, of a replayed CUDA graph, so a launch costs nothing. Rows go to
benchmarks/results/<device>/kernels.jsonl as they are done; then one table for each form shows which way of running
`linear` is the fastest at how many tokens, for `genft_kernels/backends/tuning.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.kernel.calls import Call, product, token_side, weight_side
from benchmarks.layer.cases import DTYPES, LAYERS, SPLITS, Layer
from benchmarks.measure import arguments, timing
from benchmarks.measure.environment import environment
from benchmarks.measure.rows import RESULTS, ResultStore, Row
from benchmarks.report.tables import markdown, number
from genft_kernels import backends

KEY = ("backend", "kernel", "layer", "tokens", "dtype", "k", "form")
TOKENS = (8192, 1024, 128, 16, 1)
PYTORCH = "pytorch"  # whose the product of x and W is, without an update
# From a call to its time in seconds: p20, median, p80.
Clock = Callable[[Callable[[], object]], tuple[float, float, float]]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a card does at most: bytes copied, read and write counted, and multiplications, in a second."""

    copied_bytes: float
    multiplications: float

    def floor(self, moved_bytes: int, multiplications: int) -> float:
        """Seconds that no kernel stays under."""
        return max(moved_bytes / self.copied_bytes, multiplications / self.multiplications)


def measured_rates(device: torch.device, dtype: torch.dtype, clock: Clock, size: int = 8192) -> Rates:
    """By a copy of `8 size^2` bytes and a product of two random matrices [size, size]."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2 * size, size, device=device)
    target, out = torch.empty_like(source), torch.empty_like(left)
    _, copy, _ = clock(lambda: target.copy_(source))
    _, product, _ = clock(lambda: torch.mm(left, right, out=out))
    return Rates(2 * source.numel() * source.element_size() / copy, size**3 / product)


def measure(
    names: Iterable[str],
    layers: Iterable[Layer],
    tokens: Iterable[int],
    ks: Iterable[int],
    dtype: torch.dtype,
    device: torch.device,
    rates: Rates,
    clock: Clock,
) -> Iterator[Row]:
    """A row keyed by `KEY` for each kernel and size; one that raises gives a row with the reason, and no time."""
    fields = environment(device) | {
        "copy_terabytes": round(1e-12 * rates.copied_bytes, 3),
        "product_teraflops": round(2e-12 * rates.multiplications),
    }
    dtype_name = next(name for name, each in DTYPES.items() if each == dtype)
    where = dict(dtype=dtype, device=device)

    def calls(layer: Layer) -> Iterator[tuple[str, int | None, Call]]:
        """(backend, k, call)."""
        for count in tokens:
            yield PYTORCH, None, product(layer, count, **where)
        for k, name in itertools.product(ks, names):
            kernels, size = backends.load(name).kernels, dict(k=k, **where)
            sides = (
                *(token_side(kernels, layer, count, **size) for count in tokens),
                weight_side(kernels, layer, **size),
            )
            yield from ((name, k, call) for call in itertools.chain(*sides))

    for layer in layers:
        for name, k, call in calls(layer):
            key = {
                "backend": name, "kernel": call.kernel, "layer": layer.name, "in": layer.in_features,
                "out": layer.out_features, "tokens": call.tokens, "dtype": dtype_name, "k": k, "form": call.form,
            }  # fmt: skip
            yield key | _timed(call, rates, clock) | fields


def _timed(call: Call, rates: Rates, clock: Clock) -> Row:
    try:
        times, moved = clock(call.run), call.moved_bytes()
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            torch.cuda.synchronize()  # raises again where the device is lost; a capture that failed has not harmed it
        return {"status": f"failed: {type(error).__name__}: {error}"[:300], "time_us": None, "times_floor": None}
    floor = rates.floor(moved, call.multiplications)
    return {
        "status": "measured", "time_us": [round(1e6 * each, 2) for each in times],
        "floor_us": round(1e6 * floor, 2), "times_floor": round(times[1] / floor, 2),
        "gigabytes_a_second": round(moved / times[1] / 1e9),
        "teraflops": round(2 * call.multiplications / times[1] / 1e12, 1),
    }  # fmt: skip


def ways(rows: Iterable[Row]) -> str:
    """Which way of running `linear` forward takes how many microseconds, a line for each size and form."""
    times = {tuple(row[field] for field in KEY): row["time_us"] and row["time_us"][1] for row in rows}
    lines = []
    for (backend, kernel, *size, form), time in times.items():
        if kernel not in ("extended_k", "main_loop"):
            continue
        layer, tokens, dtype, k = size
        parts = (
            times.get((backend, "fold", layer, None, dtype, k, form)),
            times.get((PYTORCH, "product", layer, tokens, dtype, None, None)),
        )
        folded = None if None in parts else sum(parts)
        fastest = "–" if None in (time, folded) else (kernel if time < folded else "fold")
        shown = ("–" if each is None else number(each) for each in (time, folded))
        lines.append((f"{layer}, k {k}, {form}", backend, tokens, kernel, *shown, fastest))
    header = "layer", "backend", "tokens", "way", "its us", "fold and product us", "fastest"
    return markdown(header, ([str(cell) for cell in each] for each in sorted(lines)))


def _gpu_clock(call: Callable[[], object]) -> tuple[float, float, float]:
    return timing.gpu_times(lambda: call, replay=True)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line for each kernel, and return the exit status: 1 if one failed, 2 without a GPU."""
    options = _parse(argv)
    if not torch.cuda.is_available():
        print("this machine has no CUDA device that PyTorch can use", file=sys.stderr)
        return 2
    device, dtype = torch.device("cuda"), DTYPES[options.dtype]
    store = ResultStore.of_command(environment(device)["device"], "kernels", KEY, options.output)
    rates = measured_rates(device, dtype, _gpu_clock)
    print(f"copies: {rates.copied_bytes / 1e12:.2f} TB/s; products: {2 * rates.multiplications / 1e12:.0f} TFLOP/s")
    sizes = [LAYERS[name] for name in options.layer], options.tokens, options.k
    red = 0
    for row in measure(options.backend, *sizes, dtype, device, rates, _gpu_clock):
        store.upsert([row])
        red += row["status"] != "measured"
        print(line(row), flush=True)
    print(f"\n{ways(store)}\nwrote {store.path}")
    return 1 if red else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    parser.add_argument(
        "--layer", nargs="+", choices=LAYERS, default=["llama-7b-qv", "roberta-base-qv", "llama-7b-mlp"]
    )
    parser.add_argument("--tokens", nargs="+", type=arguments.positive(int), default=TOKENS, metavar="T")
    parser.add_argument("--k", nargs="+", type=int, choices=SPLITS, default=[26])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    return parser.parse_args(argv)


def line(row: Row) -> str:
    """A row for the terminal."""
    sizes = " ".join(str(row[field]) for field in ("backend", "layer", "tokens", "k", "form") if row[field] is not None)
    start = f"{row['kernel']:16} {sizes:44}"
    if row["time_us"] is None:
        return f"{start} {row['status']}"
    low, middle, high = row["time_us"]
    return f"{start} {middle:9.1f} us [{low:.1f}, {high:.1f}], {row['times_floor']:.2f} x its floor"


if __name__ == "__main__":
    sys.exit(main())
