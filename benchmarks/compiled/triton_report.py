"""`make kernels-report`: registers, spills, shared memory and matrix instructions of every shipped Triton kernel.

Exits with 1 where a kernel spills, takes more shared memory than a block may have, or a matrix kernel has no wgmma
on sm_90. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from benchmarks.compiled.triton_compile import SHARED_LIMIT, TARGETS, Launch, recording, report
from genft_kernels.backends import plan as kernel_operations
from genft_kernels.backends.triton import operations as backend

RESULTS = Path(__file__).parents[1] / "results" / "triton_kernels.json"
# The kernels whose time is a big product: they must use the card's best matrix instruction in 16 bits.
MATRIX_KERNELS = ("extended_k", "contract")


def shipped_launches(dtype: torch.dtype, k: int, features: tuple[int, int] = (768, 768)) -> list[Launch]:
    """Every launch of forward and backward: one layer and a group, both forms, small and large T, dropout or not."""
    with recording() as launches:
        for layers in (1, 2):
            _generate(dtype, k, *features, layers)
        _apply(dtype, k, *features)
    return launches


def _generate(dtype: torch.dtype, k: int, n_in: int, n_out: int, layers: int) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    weights = [empty(n_out, n_in) for _ in range(layers)]
    left, right, down, bias = empty(layers, n_out, k), empty(layers, n_in, k), empty(layers, k, n_out), empty(k)
    seed = torch.zeros(layers, dtype=torch.int64)
    backend.column(weights, empty(layers, k, n_in), bias, "gelu")
    backend.column_backward(left, weights, left, "gelu", [True, False])
    for outer, dropout in (("gelu", 0.0), ("identity", 0.1), ("leaky_relu", 0.1)):
        backend.row(left, right, down, bias, seed, outer, dropout, "gelu")
        backend.row_backward(right, left, right, down, right, seed, outer, dropout, "gelu", [True] * 3 + [False])


def _apply(dtype: torch.dtype, k: int, n_in: int, n_out: int) -> None:
    weight, bias = torch.empty(n_out, n_in, dtype=dtype), torch.empty(n_out, dtype=dtype)
    thin_in, thin_out = torch.empty(n_in, k, dtype=dtype), torch.empty(n_out, k, dtype=dtype)
    seed, everything = torch.zeros(1, dtype=torch.int64), [True] * 4
    for activation, dropout in (("identity", 0.0), ("gelu", 0.0), ("identity", 0.1), ("leaky_relu", 0.1)):
        tiled = activation != "identity" or dropout > 0
        for tokens in (16, 4096):
            x, dy = torch.empty(tokens, n_in, dtype=dtype), torch.empty(tokens, n_out, dtype=dtype)
            settings = (seed, 0.5, activation, dropout, 1)
            xh = None if tiled else torch.empty(tokens, k, dtype=dtype)
            with _without_vendor_products():
                backend.linear(x, weight, bias, thin_in, thin_out, *settings)
                backend.linear_backward(dy, x, weight, thin_in, thin_out, xh, *settings, everything)


def faults(row: dict) -> Iterator[str]:
    """What a row has that must not be, in words."""
    if row["spills"]:
        yield f"{row['spills']} spill instructions"
    if row["shared"] > SHARED_LIMIT[row["target"]]:
        yield f"{row['shared']} bytes of shared memory, more than {SHARED_LIMIT[row['target']]}"
    wants_wgmma = row["kernel"] in MATRIX_KERNELS and row["target"] == "sm_90" and row["dtype"] != "float32"
    if wants_wgmma and not row["matrix"].get("HGMMA"):
        yield "no wgmma"


def rows_of(dtype: torch.dtype, k: int, targets: list[str], once: bool = False) -> Iterator[dict]:
    """Compile and describe every launch for every target, or with `once` the last launch of each kernel."""
    launches = shipped_launches(dtype, k)
    for launch in {launch.name: launch for launch in launches}.values() if once else launches:
        settings = {name: value for name, value in launch.constants if name.isupper()}
        for target in targets:
            row = report(launch, target)
            yield (
                row | {"dtype": str(dtype).removeprefix("torch."), "k": k, "settings": settings} | dict(launch.options)
            )


class _without_vendor_products:
    """The reductions and products around the kernels would read memory that nobody wrote; they cost time here."""

    def __enter__(self):
        self._linear = kernel_operations.F.linear
        kernel_operations.F.linear = lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0]))

    def __exit__(self, *exception):
        kernel_operations.F.linear = self._linear


def _rows(dtype: torch.dtype, k: int, targets: list[str]) -> Iterator[dict]:
    """All launches for sm_80 and sm_90; the last of each kernel, and once, to see that other architectures compile."""
    yield from rows_of(dtype, k, [target for target in targets if target in ("sm_80", "sm_90")])
    if dtype == torch.bfloat16 and k == 37:
        yield from rows_of(dtype, k, [target for target in targets if target not in ("sm_80", "sm_90")], once=True)


def _line(row: dict) -> str:
    matrix = " ".join(f"{name}:{count}" for name, count in row["matrix"].items())
    psi = row["settings"].get("ACTIVATION", row["settings"].get("OUTER", ""))
    problems = ", ".join(faults(row))
    return (
        f"{row['target']:7} {row['dtype']:8} k={row['k']:<3} {row['kernel']:17} {psi:10} "
        f"{'drop' if row['settings'].get('DROPOUT') else '':4} {row['registers']:3} registers, "
        f"{row['shared']:6} B shared, {row['spills']} spills, {matrix}" + (f"   FAULT: {problems}" if problems else "")
    )


def main() -> None:
    """Print a line for each kernel and target, write them as JSON, and exit with 1 on a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.triton_report", description=__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 37, 64, 256])
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, broken = [], 0
    for dtype in options.dtype:
        for k in options.k:
            for row in _rows(getattr(torch, dtype), k, options.targets):
                rows.append(row)
                broken += bool(list(faults(row)))
                print(_line(row), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    environment = {"triton": triton.__version__, "torch": torch.__version__}
    options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} kernels, {broken} with faults; wrote {options.output}")
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
