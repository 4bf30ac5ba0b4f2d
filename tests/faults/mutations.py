"""`make mutations`: plant one fault at a time in a copy of the package, and see that a test turns red.

Exits with 1 if a fault survives. The unchanged copy must pass first.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
NOT_COMPILED = "g++ failed on the CUDA sources"  # says tests/cuda_host
BACKENDS = "genft_kernels/backends/"
INTERPRETED = [
    "tests/backends/test_backends.py",
    "tests/backends/test_triton.py",
    "-k",
    "triton and (square or tall or wide or many) or beyond",
]
GROUPED = ["tests/backends/test_backends.py", "-k", "triton and one_call"]
CPU_DROPOUT = ["tests/backends/test_cpu_dropout.py"]
EAGER = ["tests/backends/test_backends.py", "tests/ops/test_precision.py", "-k", "eager"]


class Fault(NamedTuple):
    """One replacement in one file, and the tests that should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: list[str]


FAULTS = [
    Fault(
        "philox: counter of the transposed element",
        BACKENDS + "triton/math.py",
        "columns[None, :].to(tl.int64) * blocks + first[:, None]",
        "columns[None, :].to(tl.int64) + first[:, None] * blocks",
        INTERPRETED,
    ),
    Fault(
        "philox: words laid out in another order",
        BACKENDS + "triton/math.py",
        "tl.permute(pairs, (0, 2, 3, 1))",
        "tl.permute(pairs, (0, 3, 2, 1))",
        INTERPRETED,
    ),
    Fault(
        "mask dropped from the thin rows",
        BACKENDS + "triton/math.py",
        "(rows[:, None] < n_rows) & (units[None, :] < n_units)",
        "(rows[:, None] < n_rows)",
        INTERPRETED,
    ),
    Fault(
        "k rounded down to whole slices",
        BACKENDS + "triton/launch.py",
        "triton.cdiv(k, SLICE)",
        "max(1, k // SLICE)",
        INTERPRETED,
    ),
    Fault(
        "contraction: dh from the untransposed tile",
        BACKENDS + "triton/linear.py",
        "part = tl.dot(tl.trans(p.to(right.dtype)), right",
        "part = tl.dot(p.to(right.dtype), right",
        INTERPRETED,
    ),
    Fault(
        "contraction: slope forgotten",
        BACKENDS + "triton/linear.py",
        "p = scale * g * activation_slope(s, ACTIVATION)",
        "p = scale * g",
        INTERPRETED,
    ),
    Fault(
        "contraction: dropout forgotten in backward",
        BACKENDS + "triton/linear.py",
        "        p *= keep_tile(",
        "        p += 0 * keep_tile(",
        INTERPRETED,
    ),
    Fault(
        "main loop: update at the wrong rows",
        BACKENDS + "triton/linear.py",
        "rows = summed if OVER_OUT else kept",
        "rows = kept if OVER_OUT else summed",
        INTERPRETED,
    ),
    Fault(
        "matrix tile: addresses of 32 bits",
        BACKENDS + "triton/linear.py",
        "rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column",
        "rows[:, None] * stride_row + columns[None, :] * stride_column",
        INTERPRETED,
    ),
    Fault(
        "row: every layer draws the first one's mask",
        BACKENDS + "triton/row.py",
        "key = tl.load(seed + layer)",
        "key = tl.load(seed)",
        GROUPED,
    ),
    Fault(
        "thin product: every layer reads the first one's weight",
        BACKENDS + "triton/thin.py",
        "tl.load(offsets + layer)",
        "tl.load(offsets)",
        INTERPRETED,
    ),
    Fault(
        "extended K: scale forgotten",
        BACKENDS + "triton/linear.py",
        "total = rank_k_tile(small, thin, rows, columns, t, m, k, SLICES, PRECISION, BLOCK_T, BLOCK_M) * scale",
        "total = rank_k_tile(small, thin, rows, columns, t, m, k, SLICES, PRECISION, BLOCK_T, BLOCK_M)",
        INTERPRETED,
    ),
    Fault(
        "row: last tile of out not summed",
        BACKENDS + "triton/row.py",
        "for start in range(0, n_out, BLOCK_OUT):",
        "for start in range(0, n_out - BLOCK_OUT + 1, BLOCK_OUT):",
        INTERPRETED,
    ),
    Fault(
        "row: dleft lacks the mask",
        BACKENDS + "triton/row.py",
        "y, q = y * keep, q * keep",
        "y, q = y * keep, q",
        INTERPRETED,
    ),
    Fault(
        "thin product: activation of the wrong stage",
        BACKENDS + "triton/thin.py",
        "activate(z, ACTIVATION)",
        "z",
        INTERPRETED,
    ),
    Fault(
        "fold: rounded to nearest",
        BACKENDS + "triton/linear.py",
        "if DROPPED_BITS > 0:",
        "if DROPPED_BITS > 99:",
        ["tests/backends/test_triton.py", "tests/ops/test_precision.py", "-k", "triton"],
    ),
    Fault(
        "eager: update added to a rounded y",
        BACKENDS + "eager/operations.py",
        "    if not _is_16_bit(weight):\n        return F.linear(tokens",
        "    if True:\n        return F.linear(tokens",
        EAGER,
    ),
    Fault(
        "eager: fold rounded to nearest",
        BACKENDS + "eager/operations.py",
        "    if _is_16_bit(weight):\n        exact",
        "    if False:\n        exact",
        EAGER,
    ),
    Fault(
        "eager: tile computed after it was overwritten",
        BACKENDS + "eager/operations.py",
        "p = tile.backward_(",
        "tile.value_(); p = tile.backward_(",
        EAGER,
    ),
    Fault(
        "eager: mask of the other stage",
        BACKENDS + "eager/operations.py",
        "dropout_factors(seed, stream, right",
        "dropout_factors(seed, 0, right",
        EAGER,
    ),
    Fault(
        "compiled dropout: words of a block in another order",
        "csrc/dropout.cpp",
        "keep[j][lane] = words.word[j]",
        "keep[j][lane] = words.word[3 - j]",
        CPU_DROPOUT,
    ),
    Fault(
        "compiled dropout: a later thread's rows one block too early",
        "csrc/dropout.cpp",
        "factors + 4 * (begin - first) *",
        "factors + 4 * (begin - first - 1) *",
        CPU_DROPOUT,
    ),
    Fault(
        "compiled dropout: the rest of a row left out",
        "csrc/dropout.cpp",
        "start < dropout.in_features; start += kLanes",
        "start + kLanes <= dropout.in_features; start += kLanes",
        CPU_DROPOUT,
    ),
]


def run(folder: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess:
    """pytest on `tests` in the copy at `folder`, up to the first failure."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    if "triton" in tests[-1]:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


Run = Callable[[pathlib.Path, list[str]], subprocess.CompletedProcess]


def fate(fault: Fault, folder: pathlib.Path, run: Run) -> str:
    """What becomes of a fault: "caught", "SURVIVED", or "NOT PLANTED" with the reason."""
    path = folder / fault.file
    sound = path.read_text()
    if sound.count(fault.old) == 0:
        return f"NOT PLANTED, the text is no longer in {fault.file}"
    path.write_text(sound.replace(fault.old, fault.new))
    result = run(folder, fault.tests)
    path.write_text(sound)
    if NOT_COMPILED in result.stdout:
        return "NOT PLANTED, it does not compile"
    return "SURVIVED" if result.returncode == 0 else "caught"


def plant(faults: list[Fault], run: Run = run) -> int:
    """Plant each fault in a copy of the project, `run` its tests and print its fate; 0 if all are caught."""
    caught = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "demo-output", "build", "dist")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for tests in {tuple(fault.tests): fault.tests for fault in faults}.values():
            if run(folder, tests).returncode:
                print("the unchanged copy fails: " + " ".join(tests))
                return 1
        for fault in faults:
            outcome = fate(fault, folder, run)
            caught += outcome == "caught"
            print(f"{outcome:8}  {fault.what}", flush=True)
    print(f"{caught} of {len(faults)} faults caught")
    return int(caught < len(faults))


if __name__ == "__main__":
    from tests.faults.model_faults import FAULTS as MODEL_FAULTS

    sys.exit(plant(FAULTS + MODEL_FAULTS))
