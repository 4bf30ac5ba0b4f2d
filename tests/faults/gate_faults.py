"""`make gate-faults`: how many of the faults planted in the kernels the gate rejects, as "auto" would on a card.

The gate (genft_kernels/backends/gate.py) runs as it does on a card, but in Triton's interpreter and on the CUDA host.
All these faults change results: `make mutations` and `make cuda-faults` see each of them. Exits with 1 if it lets more
than one in twenty pass. Arguments: words of the faults wanted.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from genft_kernels.backends import gate
from tests import cuda_host
from tests.faults import cuda_faults, operation_faults
from tests.faults.planting import Fault, plant

SHARE = 0.95
SECONDS = 900  # a fault may let a kernel wait for ever

_INTERPRETED = """
import sys
from tests.helpers import triton_interpreter
triton_interpreter.install()
from genft_kernels.backends import gate
sys.argv[1:] = ["triton", "cpu"]
gate.main()
"""


def run_gate(folder: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess:
    """The gate on the kernels of the copy at `folder`: Triton's or CUDA's, whichever `tests`, a backend, names."""
    return _run_interpreted(folder) if tests == ["triton"] else _run_on_host(folder)


def _run_interpreted(folder: pathlib.Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    settings = dict(cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    return subprocess.run([sys.executable, "-c", _INTERPRETED], **settings)


def _run_on_host(folder: pathlib.Path) -> subprocess.CompletedProcess:
    """In a fork, so that torch need not be imported each time."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            signal.alarm(SECONDS)
            cuda_host.CSRC, cuda_host.CACHE = folder / "csrc", folder / "build"
            cuda_host.install()
            sys.argv[1:] = ["cuda", "cpu"]
            try:
                gate.main()
            except BaseException as reason:
                print(reason, flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(status), output.read())


FAULTS: list[Fault] = [
    *(f._replace(tests=["cuda"]) for f in cuda_faults.FAULTS),
    *(f._replace(tests=["triton"]) for f in operation_faults.FAULTS if "/triton/" in f.file),
]


if __name__ == "__main__":
    sys.exit(plant([fault for fault in FAULTS if " ".join(sys.argv[1:]) in fault.what], run_gate, SHARE))
