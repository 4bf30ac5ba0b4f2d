"""`python -m benchmarks.device`: everything a GPU is for, in one call, most valuable first.

Builds the CUDA kernels, runs the GPU tests, times the core cases and each kernel beside the card's ceilings, runs
compute-sanitizer, measures model steps, installs the wheel beside an empty package folder, then goes on with the full
grid. Each check is a row of benchmarks/results/<device>/checks.jsonl as soon as it ends; timings go where `make bench`
puts them. A later call leaves out the cases that the same sources have measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import command
from benchmarks.measure.environment import REPOSITORY, device_name, environment
from benchmarks.measure.rows import ResultStore

PYTHON = sys.executable
# Compiled once for all checks, and kept for the next call where the user's cache folder is not.
KERNEL_CACHE = {"GENFT_CACHE_DIR": str(REPOSITORY / "build" / "kernels")}
GRACE = 10.0  # seconds from an interrupt to a kill
# Without pytest-benchmark: beside xdist some versions of it warn, which is an error here.
_PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m")
# Few tests at a time to each process, since those that compile take long; and one thread, since all share the CPU.
_GPU_TESTS = (
    "tests/backends/test_gpu.py", "tests/backends/test_backends.py", "tests/ops/test_precision.py",
    "tests/backends/test_cuda_kernels.py", "tests/backends/test_gpu_models.py",
    "-n", str(os.cpu_count()), "--maxschedchunk", "3",
)  # fmt: skip
_ONE_THREAD = (("OMP_NUM_THREADS", "1"),)
# Every kernel of a backend, forward and backward, in few cases: few and many tokens, both forms, masks, bias.
# Who takes part in the first timings: what the targets name, not every rank and package.
_CORE = (
    "two-product-floor", "three-product-floor", "frozen", "genft-eager", "genft-triton", "genft-cuda",
    "genft-eager-token-side", "genft-triton-token-side", "genft-cuda-token-side", "official", "official-compiled",
    "peft-lora", "hand-lora", "fused-lora-triton", "fused-lora-cuda",
)  # fmt: skip
# A small and a large model, with and without accumulation, each method beside the LoRA of its k.
_STEP = (
    "--model", "roberta-base", "llama-7b-4-layers", "--seconds", "2.5", "--method", "lora-19", "lora-28", "lora-30",
    "official-fast-both", "genft-fast", "genft-fast-accumulate", "genft-fast-sum", "genft-vtab",
)  # fmt: skip
_SANITIZED = "alone and tiled-tall or many-tokens and (bfloat16 or float32)"
# Those that racecheck gets through: in the others it stops by itself in a product of cuBLAS.
_RACECHECKED = "same_inputs or fold_rounds or contraction_of_many or test_masks"
# Beside what is not compiled.
_COMPILED = (
    "--model", "roberta-base", "--accumulation", "1", "--seconds", "3", "--method", "lora-19", "genft-fast",
    "compiled-lora-19", "compiled-genft-fast",
)  # fmt: skip
_MODULE = """
import torch
from genft_kernels import GenFTConfig, GenFTLinear
layer = GenFTLinear(96, 64, config=GenFTConfig(dropout=0.1, zero_delta=False), backend="cuda", device="cuda")
layer(torch.randn(200, 96, device="cuda")).sum().backward()
assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
import genft_kernels
print("installed wheel:", genft_kernels.__file__)
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """A command that must end well, and the most seconds that it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float
    variables: tuple[tuple[str, str], ...] = ()


def sanitizer(tool: str, backend: str = "cuda") -> Check:
    """compute-sanitizer's `tool` over the kernels of a backend; over nobody else's, where a name tells ours."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    command += ("--report-api-errors", "no")  # PyTorch asks for things that may fail
    command += ("--kernel-name", "kns=genft") if backend == "cuda" else ()
    chosen = ("tests/backends/test_backends.py", "-k", f"{backend}-cuda and ({_SANITIZED})")
    if tool == "racecheck":
        chosen = ("tests/backends/test_cuda_kernels.py", "-k", _RACECHECKED)
    tests = (*_PYTEST, "gpu", *chosen)
    # Without a cache of PyTorch's own, every tensor is an allocation whose bounds are known; without NaN in fresh
    # memory, what is read before it is written shows.
    name, variables = f"{tool}, {backend}", (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), ("GENFT_POISON", "0"))
    return Check(name, (*command, *tests), 100, variables)


def bench(name: str, seconds: float, *arguments: str) -> Check:
    """The layer benchmark on some cases."""
    return Check(name, (PYTHON, "-m", "benchmarks.layer", *arguments), seconds)


def kernels(name: str, seconds: float, *arguments: str) -> Check:
    """Each kernel alone, at some sizes."""
    return Check(name, (PYTHON, "-m", "benchmarks.kernel", *arguments), seconds)


def checks(output: Path, scratch: Path) -> list[Check]:
    """All of them, most valuable first; `scratch` is a folder to install into."""
    to = ("--output", str(output))
    install = (PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    wheel = f"{' '.join(install)} --target {scratch} . && cd {scratch} && PYTHONPATH={scratch} {PYTHON} -c '{_MODULE}'"
    core = ("--provider", *_CORE, "--k", "26", "--form", "factored", "tiled", *to)
    llama, roberta = ("--layer", "llama-7b-qv"), ("--layer", "roberta-base-qv")
    return [
        Check("build", (PYTHON, "-c", "from genft_kernels.backends.cuda import extension; extension.load()"), 90),
        Check("GPU tests", (*_PYTEST, "gpu and not slow", *_GPU_TESTS), 210, _ONE_THREAD),
        bench("layer, LLaMA, many tokens", 90, *llama, *core, "--tokens", "8192"),
        Check("model step", (PYTHON, "-m", "benchmarks.step", *_STEP, *to), 100),
        kernels("kernels, LLaMA", 90, *llama, *to, "--tokens", "8192", "128", "16"),
        bench("layer, RoBERTa, many tokens", 60, *roberta, *core, "--tokens", "8192"),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        sanitizer("memcheck", "triton"),
        bench("layer, LLaMA, few tokens", 60, *llama, *core, "--tokens", "16"),
        Check("compiled step", (PYTHON, "-m", "benchmarks.step", *_COMPILED, *to), 300),
        Check("GPU tests, slow", (*_PYTEST, "gpu and slow", *_GPU_TESTS), 210, _ONE_THREAD),
        Check("installed wheel", ("bash", "-c", wheel), 120, (("GENFT_CACHE_DIR", str(scratch / "cache")),)),
        sanitizer("initcheck"),
        sanitizer("synccheck"),
        kernels("kernels, every layer", 300, *to),
        bench("full grid", 3600, "--resume", *to),
    ]


def run_check(check: Check, limit: float, log: Path) -> dict:
    """Run a check for at most `limit` seconds; what it printed is added to `log`. Returns its row, without the name."""
    start, environ = time.perf_counter(), {**KERNEL_CACHE, **os.environ, **dict(check.variables)}
    with log.open("ab") as file:
        file.write(f"\n=== {check.name}: {' '.join(check.command)}\n".encode())
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                check.command, cwd=REPOSITORY, env=environ, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_interruptible,
            )  # fmt: skip
        except FileNotFoundError:
            return {"status": "unavailable", "seconds": 0.0, "last": f"{check.command[0]} is not on this machine"}
        try:
            status = "passed" if process.wait(limit) == 0 else f"failed with {process.returncode}"
        except subprocess.TimeoutExpired:
            status = "out of time"
            _stop(process)
    lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    last = re.sub(r"\x1b\[[0-9;]*m", "", lines[-1]) if lines else ""
    return {"status": status, "seconds": round(time.perf_counter() - start, 1), "last": last[:300]}


def _interruptible() -> None:
    """A shell starts what is in its background with interrupts ignored, and a process's children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    """Interrupt, so that pytest reports what has failed so far; then kill whatever is left of the process's group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(todo: Sequence[Check], store: ResultStore, fields: dict, minutes: float, log: Path) -> bool:
    """Run checks while time is left, a row for each as it ends; True if none failed."""
    deadline, sound = time.perf_counter() + 60 * minutes, True
    for check in todo:
        left = deadline - time.perf_counter()
        if left < 10:
            print(f"{check.name}: no time left")
            continue
        row = {"check": check.name} | run_check(check, min(check.seconds, left), log)
        store.upsert([row | fields])
        sound &= not row["status"].startswith("failed")
        print(f"{check.name}: {row['status']} in {row['seconds']} s: {row['last']}", flush=True)
    return sound


def main(argv: list[str] | None = None) -> int:
    """Run the checks and return the exit status: 1 if one failed, 2 for bad arguments or without a GPU."""
    parser = command.parser_of("benchmarks.device", __doc__)
    parser.add_argument("--minutes", type=command.positive(float), default=9.0, help="in all (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="the checks to run, by the start of their names")
    parser.add_argument("--list", action="store_true", help="show the checks and stop")
    options = parser.parse_args(argv)
    output = options.output.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        todo = checks(output, Path(scratch))
        names = [check.name for check in todo]
        unknown = [name for name in options.only or () if not any(each.startswith(name) for each in names)]
        if unknown:
            parser.error(f"--only: no {', '.join(unknown)}; there are {'; '.join(names)}")
        if options.only:
            todo = [check for check in todo if check.name.startswith(tuple(options.only))]
        if options.list:
            print("\n".join(f"{check.name}: {' '.join(check.command)}" for check in todo))
            return 0
        if not torch.cuda.is_available():
            print("this machine has no CUDA device that PyTorch can use", file=sys.stderr)
            return 2
        device = torch.device("cuda")
        store = ResultStore(device_name(device), "checks", ("check",), output)
        store.path.parent.mkdir(parents=True, exist_ok=True)
        log = store.path.with_name("checks.log")
        log.unlink(missing_ok=True)
        fields = environment(device) | {"nvcc": shutil.which("nvcc")}
        print(fields)
        return 0 if run_all(todo, store, fields, options.minutes, log) else 1


if __name__ == "__main__":
    sys.exit(main())
