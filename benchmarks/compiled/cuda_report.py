"""`make cuda-report`: registers, stack, spills and shared memory of every CUDA kernel, as ptxas tells them.

Compiles csrc/ with warnings as errors and exits with 1 where a kernel spills, takes more shared memory than a block may
have, or is started by no launcher. No GPU is needed.
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
RECORDER = Path(__file__).with_name("launch_recorder.cu")
WRAPPED = (
    "__cudaRegisterFunction", "__cudaGetKernel", "__cudaLaunchKernel", "cudaLaunchKernel", "cudaFuncSetAttribute",
    "cudaGetLastError",
)  # fmt: skip
# Bytes of a block. Code for sm_80 also runs on sm_86 and sm_89, which have less.
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90a": 227 << 10}
TARGETS = tuple(SHARED_LIMIT)

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
    recording = dataclasses.replace(
        recipe,
        files={**recipe.files, RECORDER.name: RECORDER.read_bytes()},
        kernels=(*recipe.kernels, RECORDER.name),
        strict_flags=(*recipe.strict_flags, "-Xptxas=-v", f"-Xlinker={','.join(f'--wrap={name}' for name in WRAPPED)}"),
    )
    build.build(recording, build.find_nvcc(), targets, output, strict=True)
    shared = _shared_memory(output)
    rows = [row | {"shared": shared.get(row.pop("symbol"))} for row in rows_of((output / build.LOG).read_text())]
    return sorted(rows, key=lambda row: (row["source"], row["kernel"], row["target"]))


def _shared_memory(build: Path) -> dict[str, int]:
    """The most dynamic shared memory, in bytes, that a launch of each kernel asks for, by mangled name.

    A process of its own makes the launches; they are recorded, so no GPU is needed.
    """
    command = [sys.executable, "-m", "benchmarks.compiled.cuda_launches", build]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=SOURCES.parent).stdout
    most = {}
    for line in output.splitlines():
        symbol, size = line.split()
        most[symbol] = max(most.get(symbol, 0), int(size))
    return most


def rows_of(log: str) -> Iterator[dict]:
    """The kernels in a log of ninja and ptxas; sizes in bytes, shared memory as far as it is static."""
    for part in re.split(r"^\[\d+/\d+\] ", log, flags=re.MULTILINE):
        source = re.search(r" -c (\S+) -o ", part)
        for match in _PTXAS.finditer(part):
            shared = re.search(r"(\d+) bytes smem", match["more"])
            numbers = {name: int(match[name]) for name in ("registers", "stack", "spill_stores", "spill_loads")}
            yield {
                "symbol": match["symbol"], "kernel": _demangled(match["symbol"]), "source": source[1],
                "target": match["target"], **numbers, "static_shared": int(shared[1]) if shared else 0,
            }  # fmt: skip


def faults(row: dict) -> Iterator[str]:
    """What a row has that must not be, in words."""
    if spilt := row["spill_stores"] + row["spill_loads"]:
        yield f"{spilt} bytes of spills"
    if row["shared"] is None:
        yield "no launcher starts it"
    elif row["shared"] + row["static_shared"] > SHARED_LIMIT[row["target"]]:
        yield f"more than {SHARED_LIMIT[row['target']]} bytes of shared memory"


def _demangled(symbol: str) -> str:
    """`thin_product<float, 3>` of its mangled name: without namespaces, return type and parameters."""
    name = subprocess.run(["c++filt", "-p", symbol], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"^void |genft::|\(anonymous namespace\)::", "", name)


def line(row: dict) -> str:
    """A row for the terminal."""
    shared = "?" if row["shared"] is None else row["shared"] + row["static_shared"]
    spilt = row["spill_stores"] + row["spill_loads"]
    sizes = f"{row['registers']:3} registers, {row['stack']} B stack, {spilt} B spills, {shared:6} B shared"
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
