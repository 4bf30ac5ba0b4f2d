"""What dropout multiplies an update with; on a CPU by compiled code, in an eighth of the time that plain PyTorch takes.

The machine's C++ compiler makes a library of `csrc/dropout.cpp` at the first use, in less than a second, and it is kept
in the folder of compiled kernels. Where that is not possible, plain PyTorch draws the same numbers.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import warnings
from pathlib import Path

import torch

from ... import philox
from ..compiled import cache
from ..compiled.build import package_sources
from ..compiled.run import BuildError, run
from .scratch import scratch

_SOURCES = ("dropout.cpp", "philox.h")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
_LIMIT = 60  # seconds for the compiler
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Blocks of four elements below which a second thread costs more than it saves.
_BLOCKS_OF_A_THREAD = 1 << 14


def dropout_factors(
    seed: torch.Tensor,
    stream: int,
    in_features: int,
    out_features: int,
    dropout: float,
    rows: slice,
    dtype: torch.dtype,
) -> torch.Tensor:
    """1 / (1 - dropout) where `philox.keep_mask` of the same arguments keeps, else 0.

    Returns:
        [rows, in] in `dtype`, in scratch memory.
    """
    kept = torch.tensor(1 / (1 - dropout), dtype=dtype)
    compiled = _compiled() if seed.device.type == "cpu" else None
    if isinstance(compiled, str | None):
        return philox.keep_mask(seed, stream, in_features, out_features, dropout, rows).to(dtype).mul_(kept)
    first, last, count = philox.blocks_of(rows, out_features)
    factors = scratch("dropout factors", (4 * (last - first), in_features), dtype, seed.device)
    threads = min(torch.get_num_threads(), 1 + (last - first) * in_features // _BLOCKS_OF_A_THREAD)
    compiled.genft_dropout_factors(
        ctypes.c_uint64(int(seed)),
        ctypes.c_uint32(stream),
        ctypes.c_uint32(philox.threshold(dropout)),
        *map(ctypes.c_int64, (in_features, out_features, first, last)),
        ctypes.c_uint64(kept.view(_BITS[dtype.itemsize]).item()),
        ctypes.c_int(dtype.itemsize),
        ctypes.c_void_p(factors.data_ptr()),
        ctypes.c_int(threads),
    )
    return factors[:count]


def state() -> str:
    """In words: whether the numbers are drawn by compiled code, and why not."""
    compiled = _compiled()
    return f"dropout on a CPU: {f'plain PyTorch: {compiled}' if isinstance(compiled, str) else 'compiled'}"


@functools.cache
def _compiled() -> ctypes.CDLL | str:
    """The compiled functions, or, with a warning, why there are none."""
    try:
        return cache.obtain(_library())
    except (BuildError, OSError) as error:
        warnings.warn(f"dropout takes eight times as long, drawn by plain PyTorch: {error}", stacklevel=3)
        return str(error)


def _library() -> cache.Library:
    """What the compiler (`CXX`, perhaps with arguments) makes; BuildError if there is none."""
    try:
        program, *arguments = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise BuildError(f"CXX is no command: {error}") from error
    if (path := shutil.which(program)) is None:
        raise BuildError(f"there is no C++ compiler: {program} is not found")
    command = [os.path.abspath(path), *arguments, *_FLAGS]
    sources = {name: (package_sources() / name).read_bytes() for name in _SOURCES}

    def compile(folder: Path) -> Path:
        for name, content in sources.items():
            (folder / name).write_bytes(content)
        run(program, [*command, _SOURCES[0], "-o", "dropout.so"], _LIMIT, folder)
        return folder / "dropout.so"

    follows_from = (command, platform.machine(), sources)
    return cache.Library("dropout", "the code for dropout on a CPU", follows_from, compile, _load, _LIMIT)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.genft_dropout_factors  # AttributeError if it is another  # noqa: B018
    return library
