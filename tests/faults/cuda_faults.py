"""`make cuda-faults`: the faults that CUDA kernels are prone to, planted one at a time and run on the CPU host.

Every barrier, every wait for copies and every edge mask in `csrc/` is taken away in turn, found by its text; beside
them stand wrong fragments, counters, streams and strides. Exits with 1 if one survives. Arguments: `--help` lists them.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import cuda_host
from tests.faults.planting import ROOT, Fault, in_fork, main

CSRC = "csrc/"
KERNELS = "tests/backends/test_cuda_kernels.py"
# The tests that see a file's code; what is used everywhere is seen by all.
TESTS = {
    "thin.cu": [KERNELS, "-k", "column or split or more_layers"],
    "row.cu": [KERNELS, "-k", "row_of_three or row_stage"],
    "sum.cu": [KERNELS, "-k", "split"],
    "fold.cu": [KERNELS, "-k", "fold or token_side or nan or test_linear"],
    "contract.cu": [KERNELS, "-k", "token_side or activation or contraction or test_linear"],
    "tile.cuh": [KERNELS],
    "update.cuh": [KERNELS],
}


def text_of(file: str) -> str:
    return (ROOT / CSRC / file).read_text()


def place(text: str, begin: int, end: int) -> str:
    """The line or lines around text[begin:end], with as many lines before as make them unique."""
    end = text.index("\n", end)
    while True:
        begin = text.rindex("\n", 0, begin)
        if text.count(text[begin:end]) == 1:
            return text[begin:end]


def removed(file: str, what: str, pattern: str, replacement: str) -> list[Fault]:
    """A fault for each match of `pattern`, which `replacement` takes the place of."""
    text, faults = text_of(file), []
    for match in re.finditer(pattern, text):
        old = place(text, match.start(), match.end())
        line = text.count("\n", 0, match.start()) + 1
        # The match is the last of its kind in its own lines.
        head, tail = old[: old.rindex(match[0])], old[old.rindex(match[0]) + len(match[0]) :]
        faults.append(
            Fault(f"{file}:{line}: {what}", CSRC + file, old, head + match.expand(replacement) + tail, TESTS[file])
        )
    return faults


def planned(file: str, what: str, old: str, new: str) -> Fault:
    return Fault(f"{file}: {what}", CSRC + file, old, new, TESTS[file])


BARRIERS = [fault for file in TESTS for fault in removed(file, "no barrier", r"__syncthreads\(\);", ";")]
WAITS = [fault for file in TESTS for fault in removed(file, "no wait for copies", r"wait_for_copies<\d>\(\);", ";")]
TWO_EDGES = r"if \((.*) \|\| (.*)\) return;"
EDGES = [
    *(fault for file in TESTS for fault in removed(file, "first edge of the result", TWO_EDGES, r"if (\2) return;")),
    *(fault for file in TESTS for fault in removed(file, "second edge of the result", TWO_EDGES, r"if (\1) return;")),
    planned(
        "tile.cuh",
        "rows beyond the matrix read",
        "row + r < matrix.rows ? matrix.columns - column - c : 0",
        "matrix.columns - column - c",
    ),
    planned(
        "tile.cuh",
        "columns beyond the matrix copied",
        "if (aligned && inside >= kChunk) {\n            copy",
        "if (aligned && inside > 0) {\n            copy",
    ),
    planned("tile.cuh", "columns beyond the matrix read", "e < inside ? read(from + e) : T(0.0f)", "read(from + e)"),
    planned(
        "tile.cuh",
        "edge not zeroed",
        "to[e] = e < inside ? read(from + e) : T(0.0f)",
        "if (e < inside) to[e] = read(from + e)",
    ),
    planned(
        "tile.cuh",
        "unaligned rows copied in chunks",
        "if (aligned && inside >= kChunk) {\n            copy",
        "if (inside >= kChunk) {\n            copy",
    ),
    planned(
        "tile.cuh",
        "unaligned rows stored in chunks",
        "(reinterpret_cast<uintptr_t>(matrix) | columns * sizeof(T)) % 16 == 0",
        "true",
    ),
    planned("tile.cuh", "rows beyond the matrix stored", "        if (row + r >= rows) continue;\n", ""),
    planned(
        "tile.cuh",
        "columns beyond the matrix stored in chunks",
        "if (aligned && inside >= kChunk) {\n            write",
        "if (aligned) {\n            write",
    ),
    planned("tile.cuh", "columns beyond the matrix stored", "e < kChunk && e < inside", "e < kChunk"),
]
WRONG = [
    planned("tile.cuh", "k rounded down", "ceil_divide(k - unit, kUnits) * kUnits", "(k - unit) / kUnits * kUnits"),
    planned("tile.cuh", "hidden units cut", "if (n * 8 >= columns)", "if (n * 8 >= columns - 8)"),
    planned(
        "tile.cuh", "next slice into the buffer in use", "load(step + 1, (step + 1) % 2)", "load(step + 1, step % 2)"
    ),
    planned("tile.cuh", "first slice in the group of the second", "load(0, 0);\n    commit_copies();", "load(0, 0);"),
    planned(
        "tile.cuh",
        "a: matrices in the wrong order",
        "matrix % 2 * 8, at = d + matrix / 2 * 8;",
        "matrix / 2 * 8, at = d + matrix % 2 * 8;",
    ),
    planned(
        "tile.cuh",
        "b: matrices in the wrong order",
        "matrix / 2 * 8, at = d + matrix % 2 * 8;",
        "matrix % 2 * 8, at = d + matrix / 2 * 8;",
    ),
    planned("tile.cuh", "a: never transposed", "load_matrices<kATransposed>(left", "load_matrices<false>(left"),
    planned("tile.cuh", "b: never transposed", "load_matrices<kBTransposed>(right", "load_matrices<false>(right"),
    planned("tile.cuh", "b: halves exchanged", "left, right[0], right[1]", "left, right[1], right[0]"),
    planned("tile.cuh", "b: first columns twice", "left, right[2], right[3]", "left, right[0], right[1]"),
    planned(
        "tile.cuh",
        "addresses in 32 bits",
        "matrix.data + (row + r) * matrix.stride",
        "matrix.data + (row + r) * static_cast<int>(matrix.stride)",
    ),
    planned("tile.cuh", "float32: one row twice", "*a_at(row + i * 8, d)", "*a_at(row, d)"),
    planned("tile.cuh", "warps on the same rows", "threadIdx.x / 32 * 16", "0"),
    planned(
        "tile.cuh",
        "a stack's layer not found",
        "static_cast<int64_t>(layer) * rows * columns",
        "static_cast<int64_t>(layer) * columns",
    ),
    planned(
        "update.cuh",
        "counter of the transposed element",
        "block_counter(i, j, n_out), dropout",
        "block_counter(j, i, n_out), dropout",
    ),
    planned("update.cuh", "words in another order", "words.word[e] >= dropout", "words.word[3 - e] >= dropout"),
    planned("update.cuh", "what should stay is dropped", ">= dropout.threshold ?", "< dropout.threshold ?"),
    planned("update.cuh", "every layer with the first one's seed", "read(seeds + layer)", "read(seeds)"),
    planned("update.cuh", "always the mask of the row stage", "dropout.stream, key)", "kRowStream, key)"),
    planned("update.cuh", "kept values not scaled", "? dropout.keep_scale : 0.0f", "? 1.0f : 0.0f"),
    planned("update.cuh", "rounding by other bits", "word >> (32 - kBits) % 32", "word >> (31 - kBits) % 32"),
    planned("update.cuh", "NaN rounded", "kBits == 0 || !isfinite(exact)", "kBits == 0"),
    planned("update.cuh", "gelu's slope without its density", "+ z * 0.39894228f * expf(-0.5f * z * z)", ""),
    planned("update.cuh", "leaky slope of relu", "z <= 0.0f ? kLeakySlope : 1.0f", "z <= 0.0f ? 0.0f : 1.0f"),
    *removed("thin.cu", "every layer with the first one's matrix", r"matrices\.data\[layer\]", "matrices.data[0]"),
    planned("update.cuh", "activation forgotten", "z = activate(static_cast<float>(rounded), activation);", ""),
    *removed("thin.cu", "every split from the first slice", r"first = split \* sizes\.per_split;", "first = 0;"),
    *removed("thin.cu", "splits' parts in one place", r"split\) \* sizes\.stack", "0) * sizes.stack"),
    planned("sum.cu", "last part not added", "part < count;", "part < count - 1;"),
    planned("sum.cu", "first sum's parts twice", "sum_of<T>(second.parts", "sum_of<T>(first.parts"),
    planned("sum.cu", "elements beyond the sum", "    if (at >= size) return;\n", ""),
    planned(
        "row.cu", "Q lacks the mask", "slope(argument, given.outer) * keep.value[e]", "slope(argument, given.outer)"
    ),
    planned("row.cu", "Q lacks the slope", " * slope(argument, given.outer)", ""),
    planned("row.cu", "Y untransposed", "multiply<true, false>(z", "multiply<false, false>(z"),
    planned(
        "row.cu",
        "dleft from Y",
        "multiply<false, true>(dleft, shared.operand[1]",
        "multiply<false, true>(dleft, shared.operand[0]",
    ),
    planned("fold.cu", "rounded by the words of the mask", "kRoundingStream, key", "dropout.stream, key"),
    planned("fold.cu", "transposed W folded as it lies", "transposed ? c * kRow<T, kEdge> + r + e :", "false ? 0 :"),
    planned("contract.cu", "dh from the untransposed tile", "multiply<true, true>(dh", "multiply<false, true>(dh"),
    planned("contract.cu", "one tile's G for all of a block", "if (i == tile) g[i]", "if (i == 0) g[i]"),
    planned("contract.cu", "slope forgotten", " * slope(s_element, activation)", ""),
    planned(
        "contract.cu",
        "parts of db in one place",
        "blockIdx.z * ceil_divide(n_in, kEdge) + column / kEdge;",
        "blockIdx.z * ceil_divide(n_in, kEdge);",
    ),
    planned("contract.cu", "every split from the first token", "first = blockIdx.z * per_split;", "first = 0;"),
    planned("contract.cu", "splits' parts of dh in one place", "blockIdx.z * ceil_divide(n_out, kEdge) + row", "row"),
]


def run_on_host(folder: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess:
    """pytest on this project's `tests` with the kernels of `folder`."""
    return on_host(folder, lambda: pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))


def on_host(folder: pathlib.Path, judge: Callable[[], int]) -> subprocess.CompletedProcess:
    """`judge` in a fork whose CUDA host has the kernels of `folder`."""

    def judge_copy() -> int:
        cuda_host.CSRC, cuda_host.CACHE = folder / "csrc", folder / "build"
        cuda_host.FLAGS.append("-O1")  # compiled in half the time
        return judge()

    return in_fork(judge_copy)


FAULTS = [*BARRIERS, *WAITS, *EDGES, *WRONG]


if __name__ == "__main__":
    sys.exit(main(FAULTS, run_on_host))
