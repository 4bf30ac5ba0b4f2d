"""`make cuda-report`: registers, stack and spills of every CUDA kernel, as ptxas tells them.

Compiles csrc/ with warnings as errors and exits with 1 where a kernel spills or has static shared memory: all must be
in the one structure whose size csrc/device.cuh holds below a block's limit. No GPU is needed.
"""

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.compiled import REPORTS, gate
from genft_kernels.backends.compiled import build

SOURCES = Path(__file__).parents[2] / "csrc"
TARGETS = ("sm_80", "sm_90a")

_PTXAS = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


def compile_verbosely(output: Path, targets: Sequence[str] = TARGETS) -> list[dict]:
    """Compile and link csrc/ into the folder `output`, a warning being an error, and describe every kernel.

    Raises:
        BuildError: it does not compile without warnings, or there is no nvcc.
    """
    recipe = build.Recipe.read(SOURCES)
    recipe = dataclasses.replace(recipe, strict_flags=(*recipe.strict_flags, "-Xptxas=-v"))
    build.build(recipe, build.find_nvcc(), targets, output, strict=True)
    return sorted(
        rows_of((output / build.LOG).read_text()), key=lambda row: (row["source"], row["kernel"], row["target"])
    )


def rows_of(log: str) -> Iterator[dict]:
    """The kernels in a log of ninja and ptxas; sizes in bytes."""
    for part in re.split(r"^\[\d+/\d+\] ", log, flags=re.MULTILINE):
        source = re.search(r" -c (\S+) -o ", part)
        for match in _PTXAS.finditer(part):
            shared = re.search(r"(\d+) bytes smem", match["more"])
            numbers = {name: int(match[name]) for name in ("registers", "stack", "spill_stores", "spill_loads")}
            yield {
                "kernel": _demangled(match["symbol"]), "source": source[1], "target": match["target"], **numbers,
                "static_shared": int(shared[1]) if shared else 0,
            }  # fmt: skip


def faults(row: dict) -> Iterator[str]:
    """Faults of a row, in words."""
    if spilt := row["spill_stores"] + row["spill_loads"]:
        yield f"{spilt} bytes of spills"
    if row["static_shared"]:
        yield f"{row['static_shared']} bytes of static shared memory"


def _demangled(symbol: str) -> str:
    """`thin_product<float, 3>` of its mangled name: without namespaces, return type and parameters."""
    name = subprocess.run(["c++filt", "-p", symbol], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"^void |genft::|\(anonymous namespace\)::", "", name)


def line(row: dict) -> str:
    """A row for the terminal."""
    spilt = row["spill_stores"] + row["spill_loads"]
    sizes = f"{row['registers']:3} registers, {row['stack']} B stack, {spilt} B spills"
    return f"{row['target']:7} {row['source']:12} {row['kernel']:42} {sizes}"


def main(argv: list[str] | None = None) -> int:
    """Compile, show and write every kernel; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.cuda_report", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--output", type=Path, default=REPORTS / "cuda_kernels.jsonl")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return gate(compile_verbosely(Path(folder) / "build", options.targets), options.output, line, faults)


if __name__ == "__main__":
    sys.exit(main())
