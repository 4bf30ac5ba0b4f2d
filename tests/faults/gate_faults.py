"""`make gate-faults`: how many of the faults planted in the kernels the gate rejects, as "auto" would on a card.

The gate (genft_kernels/backends/gate.py) runs as it does on a card, but in Triton's interpreter and on the CUDA host.
All these faults change results: `make mutations` and `make cuda-faults` see each of them. A hang or a crash is a
rejection. In the interpreter the quick cases come first. Exits with 1 if it lets more than one in twenty pass.
Arguments: `--help` lists them.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

from genft_kernels import backends
from genft_kernels.backends import gate
from tests import cuda_host
from tests.faults import cuda_faults, operation_faults
from tests.faults.planting import Fault, main, run_python

SHARE = 0.95
for _name in ("eager", "cuda"):  # before any fork: all faults are judged by one gate, whatever happens to its files
    backends.load(_name)

_INTERPRETED = """
import sys
from tests.helpers import triton_interpreter
triton_interpreter.install()
from genft_kernels.backends import gate
gate.CASES = [gate.CASES[number] for number in (0, 3, 5, 1, 2, 4)]
sys.argv[1:] = ["triton", "cpu"]
gate.main()
"""


def run_gate(folder: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess:
    """The gate on the kernels of the copy at `folder`: Triton's or CUDA's, whichever `tests`, a backend, names."""
    if tests == ["triton"]:
        return run_python(folder, "-c", _INTERPRETED, TRITON_INTERPRET="1")
    return cuda_faults.on_host(folder, _judge_cuda)


def _judge_cuda() -> int:
    cuda_host.install()
    sys.argv[1:] = ["cuda", "cpu"]
    gate.main()
    return 0


FAULTS: list[Fault] = [
    *(f._replace(what=f"cuda: {f.what}", tests=["cuda"]) for f in cuda_faults.FAULTS),
    *(f._replace(what=f"triton: {f.what}", tests=["triton"]) for f in operation_faults.FAULTS if "/triton/" in f.file),
]


if __name__ == "__main__":
    sys.exit(main(FAULTS, run_gate, SHARE))
