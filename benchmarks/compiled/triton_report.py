"""`make kernels-report`: registers, spills, shared memory and matrix instructions of every shipped Triton kernel.

Exits with 1 where a kernel spills in a loop (in float32 more than a value) or spills much, takes more shared memory
than a block may have, or more registers than leave room for the programs that the plan counts on at once; where ptxas
has a note C75xx, as for wgmma that wait for each other; where a loop that should copy asynchronously loads otherwise;
where a register is written that a wgmma may still read; and where a matrix kernel has no wgmma on sm_90. No GPU is
needed.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton

from benchmarks.compiled import REPORTS, gate
from benchmarks.compiled.triton_compile import SHARED_LIMIT, TARGETS, Launch, recording, report
from benchmarks.layer.cases import DTYPES
from genft_kernels.backends import plan as kernel_operations
from genft_kernels.backends.triton import launch as launching
from genft_kernels.backends.triton import operations as backend

# The kernels whose time is a big product: they must use the card's best matrix instruction in 16 bits.
MATRIX_KERNELS = ("contract",)
# Those whose loop goes over big matrices: in 16 bits it must copy what the next steps take, and wait for nothing.
PIPELINED_KERNELS = ("contract", "thin_product", "thin_transposed")

# Of a multiprocessor, on every card; and how many programs `plan._split` counts on there at once, where more than one.
REGISTERS = 65_536
AT_ONCE = {"thin_product": 2, "thin_transposed": 2}
# Of a kernel's instructions, that spill where no loop repeats them, and in a float32 kernel's loops, where ptxas leaves
# a value in memory to let more programs run at once: more would be seen in its time.
SPILT_SHARE, SPILT_IN_LOOPS = 0.01, 0.002


def shipped_launches(dtype: torch.dtype, k: int, features: tuple[int, int] = (768, 768)) -> list[Launch]:
    """Every launch of forward and backward: one layer and a group, small and large T, dropout or not."""
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
    for activation, dropout in (("gelu", 0.0), ("identity", 0.1), ("leaky_relu", 0.1)):
        for tokens in (16, 4096):
            x, dy = torch.empty(tokens, n_in, dtype=dtype), torch.empty(tokens, n_out, dtype=dtype)
            settings = (seed, 0.5, activation, dropout, 1)
            with mock.patch.object(kernel_operations.F, "linear", _no_product):
                backend.linear(x, weight, bias, thin_in, thin_out, *settings)
                backend.linear_backward(dy, x, weight, thin_in, thin_out, None, *settings, everything)


def _no_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In place of the products around the kernels, which would read memory that nobody wrote and cost time."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def faults(row: dict) -> Iterator[str]:
    """Faults of a row, in words."""
    if row["spills_in_loops"] > (SPILT_IN_LOOPS * row["instructions"] if row["dtype"] == "float32" else 0):
        yield f"{row['spills_in_loops']} spill instructions in a loop"
    elif row["spills"] > SPILT_SHARE * row["instructions"]:
        yield f"{row['spills']} spill instructions of {row['instructions']}"
    if row["shared"] > SHARED_LIMIT[row["target"]]:
        yield f"{row['shared']} bytes of shared memory, more than {SHARED_LIMIT[row['target']]}"
    programs = AT_ONCE.get(row["kernel"], 1)
    if row["registers"] * 32 * row["num_warps"] * programs > REGISTERS:
        yield f"{row['registers']} registers: no room for {programs} programs at once"
    if row.get("notes"):
        yield f"ptxas notes {', '.join(row['notes'])}"
    if row.get("overwritten"):
        yield f"a wgmma's operand is overwritten by {row['overwritten'][0]}"
    aligned = row["k"] % 16 == 0 and row["dtype"] != "float32"  # as the package makes k on a GPU in 16 bits
    if aligned and row["kernel"] in PIPELINED_KERNELS and any(loop["loads"] for loop in row.get("hot_loops", ())):
        yield "synchronous loads in a hot loop"
    wants_wgmma = row["kernel"] in MATRIX_KERNELS and row["target"] == "sm_90" and row["dtype"] != "float32"
    if wants_wgmma and not row["matrix"].get("HGMMA"):
        yield "no wgmma"


def rows_of(
    dtype: torch.dtype,
    k: int,
    targets: list[str],
    once: bool = False,
    features: tuple[int, int] = (768, 768),
    known: set[tuple[str, Launch]] | None = None,
) -> Iterator[dict]:
    """Compile and describe every launch for every target, or with `once` the last launch of each kernel.

    Each is described once, and not if it is in `known`, which it is added to.
    """
    known = set() if known is None else known
    for target in targets:
        with mock.patch.object(launching, "shared_memory", lambda device, target=target: SHARED_LIMIT[target]):
            launches = shipped_launches(dtype, k, features)
        for launch in {launch.name: launch for launch in launches}.values() if once else launches:
            if (target, launch) in known:
                continue
            known.add((target, launch))
            settings = {name: value for name, value in launch.constants if name.isupper()}
            row = report(launch, target)
            sizes = {"dtype": str(dtype).removeprefix("torch."), "k": k, "features": features}
            yield row | sizes | {"settings": settings, "triton": triton.__version__} | dict(launch.options)


def _rows(dtype: torch.dtype, k: int, targets: list[str], known: set[tuple[str, Launch]]) -> Iterator[dict]:
    """All launches for sm_80, sm_89 and sm_90; the last of each kernel, and once, to see that others compile.

    In 16 bits with k as the package makes it on a GPU, for a small layer and a large one; most kernels are the same.
    """
    common = [target for target in targets if target in ("sm_80", "sm_89", "sm_90")]
    half = dtype.itemsize == 2
    for features in ((768, 768), (4096, 4096)) if half else ((768, 768),):
        yield from rows_of(dtype, -(-k // 16) * 16 if half else k, common, features=features, known=known)
    if dtype == torch.bfloat16 and k == 37:
        yield from rows_of(dtype, 48, [target for target in targets if target not in common], once=True)


def line(row: dict) -> str:
    """A row for the terminal."""
    matrix = " ".join(f"{name}:{count}" for name, count in row["matrix"].items())
    psi = row["settings"].get("ACTIVATION", row["settings"].get("OUTER", ""))
    return (
        f"{row['target']:7} {row['dtype']:8} k={row['k']:<3} {row['kernel']:17} {psi:10} "
        f"{'drop' if row['settings'].get('DROPOUT') else '':4} {row['registers']:3} registers, "
        f"{row['shared']:6} B shared, {row['spills']} spills, {matrix}, hot loops of {_hot(row)} instructions"
    )


def _hot(row: dict) -> str:
    return "/".join(str(loop["instructions"]) for loop in row.get("hot_loops", ())) or "no"


def main(argv: list[str] | None = None) -> int:
    """Compile, show and write every kernel; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.triton_report", description=__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 27, 37, 64, 256])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--output", type=Path, default=REPORTS / f"triton_{triton.__version__}_kernels.jsonl")
    options = parser.parse_args(argv)
    sizes = itertools.product((DTYPES[name] for name in options.dtype), options.k)
    known: set[tuple[str, Launch]] = set()
    rows = itertools.chain.from_iterable(_rows(dtype, k, options.targets, known) for dtype, k in sizes)
    return gate(rows, options.output, line, faults)


if __name__ == "__main__":
    sys.exit(main())
