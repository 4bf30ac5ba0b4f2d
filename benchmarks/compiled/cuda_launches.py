"""Makes every launch of a build that `launch_recorder.cu` is linked to, and prints what each kernel was given.

`python -m benchmarks.compiled.cuda_launches FOLDER`; a line is a mangled name and the bytes of dynamic shared memory.
"""

import ctypes
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from genft_kernels.backends.cuda.extension import import_build

HEADER = Path(__file__).parents[2] / "csrc" / "genft.h"

# Values of the launchers' parameters, by name; where there are several, every combination is launched.
SIZES = {name: [768] for name in ("m", "n", "stride", "tokens_stride", "x_stride", "dy_stride")}
SIZES |= {name: [768, 4096] for name in ("n_in", "n_out")}  # small enough and large enough for each size of block
SIZES |= {"layers": [1], "k": [37], "k1": [37], "rows_per_split": [64], "t": [16, 4096]}
SETTINGS = {name: [3] for name in ("activation", "inner", "outer")} | {"dtype": [0, 1, 2], "random_stream": [1]}
SETTINGS |= {"threshold": [1 << 29], "keep_scale": [1.1], "scale": [0.5]}


def launchers() -> Iterator[tuple[str, list[list]]]:
    """The name of each launcher of genft.h, and the values that each of its parameters is to have.

    Raises:
        KeyError: a parameter that is neither a pointer nor a bool and not among those above.
    """
    for name, parameters in re.findall(r"^int (\w+)\(([^)]*)\);", HEADER.read_text(), re.MULTILINE):
        yield name, [_values(*parameter.strip().rsplit(maxsplit=1)) for parameter in parameters.split(",")]


def _values(kind: str, name: str) -> list:
    if kind == "const void* const*":
        return [[0]]
    if kind.endswith("*"):
        return [0]
    return [False, True] if kind == "bool" else (SIZES | SETTINGS)[name]


def launch_everything(kernels: ModuleType) -> None:
    """Call each launcher with every combination of the values, null pointers for tensors.

    Raises:
        RuntimeError: a launcher returned an error.
    """
    for name, values in launchers():
        for arguments in itertools.product(*values):
            if code := getattr(kernels, name)(*arguments):
                raise RuntimeError(f"{name}{arguments}: {kernels.error_string(code)}")


def main() -> None:
    """Print a line for each launch."""
    kernels = import_build(Path(sys.argv[1]))
    recorder = ctypes.CDLL(kernels.__file__)
    recorder.recorded_launches.restype = ctypes.c_char_p
    recorder.record_launches()
    launch_everything(kernels)
    print(recorder.recorded_launches().decode(), end="")


if __name__ == "__main__":
    main()
