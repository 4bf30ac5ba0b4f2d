"""What dropout multiplies an update with; on a CPU by compiled code, in an eighth of the time that plain PyTorch takes.

The machine's C++ compiler makes a library of `csrc/dropout.cpp` at the first use, in less than a second, and it is kept
in the folder of compiled kernels. Where that is not possible, plain PyTorch draws the same numbers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from ... import philox
from .. import _jit
from .scratch import scratch

_SOURCES = ("dropout.cpp", "philox.h")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
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
    library = _library() if seed.device.type == "cpu" else None
    if not isinstance(library, ctypes.CDLL):
        return philox.keep_mask(seed, stream, in_features, out_features, dropout, rows).to(dtype).mul_(kept)
    first, last, count = philox.blocks_of(rows, out_features)
    factors = scratch("dropout factors", (4 * (last - first), in_features), dtype, seed.device)
    threads = min(torch.get_num_threads(), 1 + (last - first) * in_features // _BLOCKS_OF_A_THREAD)
    library.genft_dropout_factors(
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
    library = _library()
    return f"dropout on a CPU: {'compiled' if isinstance(library, ctypes.CDLL) else f'plain PyTorch: {library}'}"


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled functions, or why there are none."""
    asked_for = os.environ.get("CXX") or "c++"
    compiler = shutil.which(asked_for)
    if compiler is None:
        return f"there is no C++ compiler: {asked_for} is not found"
    folder = _jit.package_sources()
    digest = hashlib.sha256(repr((compiler, _FLAGS, platform.machine())).encode())
    for name in _SOURCES:
        digest.update((folder / name).read_bytes())
    name, cache = f"dropout-{digest.hexdigest()[:24]}.so", _jit.cache_folder()
    try:
        return _load_or_compile(cache / name, compiler, folder)
    except OSError:  # the cache cannot be written: this process compiles for itself
        with tempfile.TemporaryDirectory(prefix="genft_kernels-") as own:
            return _load_or_compile(Path(own) / name, compiler, folder)


def _load_or_compile(path: Path, compiler: str, sources: Path) -> ctypes.CDLL | str:
    """The library at `path`, compiled unless it is there and sound; or what the compiler said."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # absent or damaged
        path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    command = [compiler, *_FLAGS, str(sources / _SOURCES[0]), "-o", str(unfinished)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = f"{compiler} failed: {result.stderr.strip() or f'exit status {result.returncode}'}"
        warnings.warn(f"dropout takes eight times as long, drawn by plain PyTorch: {reason}", stacklevel=2)
        return reason
    unfinished.rename(path)  # nobody sees half of it
    return ctypes.CDLL(str(path))
