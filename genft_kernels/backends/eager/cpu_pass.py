"""The elementwise steps over a tile on a CPU in one pass of compiled code, where PyTorch takes one for each.

The machine's C++ compiler makes a library of `csrc/cpu_update.cpp` at the first use, in a few seconds, and it is kept
in the folder of compiled kernels. Where that is not possible, plain PyTorch computes the same: masks are equal bit for
bit, numbers but for rounding.
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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import philox
from ...activations import ACTIVATIONS
from ..compiled import cache
from ..compiled.build import package_sources
from ..compiled.run import BuildError
from ..compiled.run import run as run_compiler
from .rounding import dither_of
from .scratch import scratch

if TYPE_CHECKING:
    from .fold import Folding
    from .update_tile import UpdateTile

_SOURCES = ("cpu_update.cpp", "cpu_math.h", "cpu_philox.h", "genft.h", "philox.h")
# Without traps and errno, which nobody here looks at, compilers make vectors of more loops; no result changes.
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_LIMIT = 180  # seconds for the compiler
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# Elements below which a second thread costs more than it saves.
_ELEMENTS_OF_A_THREAD = 1 << 16


class _Tile(ctypes.Structure):
    """`Tile` of csrc/cpu_update.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pre", "grad", "weight", "folded", "dither")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "dither_size", "dither_start")),
        *((name, ctypes.c_int64) for name in ("first_row", "tile_rows", "rows", "columns")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_double) for name in ("scale", "keep_scale")),
        *((name, ctypes.c_uint32) for name in ("stream", "threshold")),
        *((name, ctypes.c_int32) for name in ("dtype", "activation", "drops", "value")),
    ]


def run(tile: UpdateTile, grad: Tensor | None, value: bool, folding: Folding | None) -> bool:
    """`UpdateTile.evaluate_`, where there is compiled code for it; whether that is so."""
    update, rows, pre = tile
    if pre.device.type != "cpu" or pre.dtype not in _DTYPES or isinstance(compiled := _compiled(), str):
        return False
    first, last, count = philox.blocks_of(rows, update.left.shape[0])
    call = _Tile(
        pre=pre.data_ptr(),
        value=value,
        first_row=4 * first,
        tile_rows=count,
        rows=update.left.shape[0],
        columns=update.right.shape[0],
        dtype=_DTYPES[pre.dtype],
        activation=ACTIVATIONS.index(update.activation),
    )
    if grad is not None:
        call.grad = grad.data_ptr()
    if update.dropout > 0:
        assert update.seed is not None
        call.drops, call.seed, call.stream = True, int(update.seed), update.stream
        call.threshold, call.keep_scale = philox.threshold(update.dropout), 1 / (1 - update.dropout)
    if folding is not None:
        weight = _with_contiguous_rows(folding.weight[rows])
        call.weight, call.weight_stride, call.scale = weight.data_ptr(), weight.stride(0), folding.scale
        call.folded = folding.out[rows].data_ptr()
        if pre.dtype.itemsize == 2:
            table, call.dither_start = dither_of(pre.dtype, update.seed, rows.start * weight.shape[1])
            call.dither, call.dither_size = table.data_ptr(), table.numel()
    threads = min(torch.get_num_threads(), 1 + pre.numel() // _ELEMENTS_OF_A_THREAD)
    compiled.genft_update_tile(ctypes.byref(call), ctypes.c_int(threads))
    return True


def state() -> str:
    """In words: whether a CPU's tiled form is computed by compiled code, and why not."""
    compiled = _compiled()
    return f"the tiled form on a CPU: {f'plain PyTorch: {compiled}' if isinstance(compiled, str) else 'compiled'}"


def _with_contiguous_rows(weight: Tensor) -> Tensor:
    if weight.stride(1) == 1 or weight.shape[1] == 1:
        return weight
    return scratch("weight", tuple(weight.shape), weight.dtype, weight.device).copy_(weight)


@functools.cache
def _compiled() -> ctypes.CDLL | str:
    """The compiled functions, or, with a warning, why there are none."""
    try:
        library: ctypes.CDLL = cache.obtain(_library())
        return library
    except (BuildError, OSError) as error:
        warnings.warn(f"the tiled form takes longer, computed by plain PyTorch: {error}", stacklevel=3)
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
        run_compiler(program, [*command, _SOURCES[0], "-o", "cpu_update.so"], _LIMIT, folder)
        return folder / "cpu_update.so"

    follows_from = (command, platform.machine(), sources)
    return cache.Library("cpu_update", "the code for the tiled form on a CPU", follows_from, compile, _load, _LIMIT)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.genft_update_tile  # AttributeError if it is another  # noqa: B018
    return library
