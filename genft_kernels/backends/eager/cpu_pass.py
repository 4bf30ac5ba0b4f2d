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

import torch
from torch import Tensor

from ... import philox
from ...activations import ACTIVATIONS
from ...scratch import scratch
from ..compiled import cache
from ..compiled.build import package_sources
from ..compiled.run import BuildError
from ..compiled.run import run as run_compiler
from .fold import Folding
from .rounding import dither_of
from .update_tile import Others, Sums, Update, Wanted

_SOURCES = ("cpu_update.cpp", "cpu_block.h", "cpu_math.h", "cpu_philox.h", "cpu_thin.h", "genft.h", "philox.h")
# Without traps and errno, which nobody here looks at, compilers make vectors of more loops; no result changes.
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_LIMIT = 180  # seconds for the compiler
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# Elements below which a second thread costs more than it saves.
_ELEMENTS_OF_A_THREAD = 1 << 16
# The longest product of `others` that is formed on the way instead of in memory.
_LONGEST_ON_THE_WAY = 64


class _Thin(ctypes.Structure):
    """`Thin` of csrc/cpu_update.cpp."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("unit_stride", ctypes.c_int64)]

    @classmethod
    def of(cls, matrix: Tensor | None) -> _Thin:
        return cls() if matrix is None else cls(matrix.data_ptr(), *matrix.stride())


class _Sweep(ctypes.Structure):
    """`Sweep` of csrc/cpu_update.cpp."""

    _fields_ = [
        *((name, _Thin) for name in ("left", "right", "others_left", "others_right")),
        ("grad", ctypes.c_void_p),
        *((f"{name}_sums", ctypes.c_void_p) for name in ("left", "right", "others_left", "others_right")),
        *((name, ctypes.c_void_p) for name in ("weight", "folded", "dither")),
        *((name, ctypes.c_int64) for name in ("k", "m", "weight_stride", "dither_size", "dither_start")),
        *((name, ctypes.c_int64) for name in ("first_row", "rows", "all_rows", "columns")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_double) for name in ("scale", "keep_scale")),
        *((name, ctypes.c_uint32) for name in ("stream", "threshold")),
        *((name, ctypes.c_int32) for name in ("dtype", "activation", "drops", "has_gradient")),
    ]


def sweep(update: Update, others: Others, wanted: Wanted, folding: Folding | None) -> Sums | None:
    """`sweep.sweep`, where there is compiled code for it; else None."""
    left, dtype = update.left, update.left.dtype
    if left.device.type != "cpu" or dtype not in _DTYPES or isinstance(_compiled(), str):
        return None
    (rows, k), columns, wide = left.shape, update.right.shape[0], torch.promote_types(dtype, torch.float32)
    m = next((matrix.shape[1] for matrix in others if matrix is not None), 0)
    in_memory = wanted.gradient and m > _LONGEST_ON_THE_WAY
    shapes = (rows, k), (columns, k), (rows, m), (columns, m)
    wants = zip(shapes, wanted, strict=True)
    sums = Sums(*(torch.zeros(shape, dtype=wide, device=left.device) if want else None for shape, want in wants))
    for part in update.tiles() if in_memory else [slice(0, rows)]:
        grad = others.product("grad", part) if in_memory else None
        beside = Others() if in_memory and not (wanted.others_left or wanted.others_right) else others
        of_part = sums._replace(left=_rows(sums.left, part), others_left=_rows(sums.others_left, part))
        run(update, part, beside, grad, of_part, folding)
    return sums


def run(update: Update, rows: slice, others: Others, grad: Tensor | None, sums: Sums, folding: Folding | None) -> None:
    """One call of the compiled code, for some rows.

    Args:
        grad: that of U  [rows, columns], where it is not the product of `others`.
        sums: what is wanted, in the wide dtype; `left` and `others_left` of these rows, the others are added to.
    """
    compiled, dtype = _compiled(), update.left.dtype
    assert not isinstance(compiled, str)
    first, _, count = philox.blocks_of(rows, update.left.shape[0])
    call = _Sweep(
        left=_Thin.of(update.left[rows]),
        right=_Thin.of(update.right),
        others_left=_Thin.of(_rows(others.left, rows)),
        others_right=_Thin.of(others.right),
        grad=_address(grad),
        left_sums=_address(sums.left),
        right_sums=_address(sums.right),
        others_left_sums=_address(sums.others_left),
        others_right_sums=_address(sums.others_right),
        k=update.left.shape[1],
        m=next((matrix.shape[1] for matrix in others if matrix is not None), 0),
        first_row=4 * first,
        rows=count,
        all_rows=update.left.shape[0],
        columns=update.right.shape[0],
        dtype=_DTYPES[dtype],
        activation=ACTIVATIONS.index(update.activation),
        has_gradient=sums.left is not None or sums.right is not None,
    )
    if update.dropout > 0:
        assert update.seed is not None
        call.drops, call.seed, call.stream = True, int(update.seed), update.stream
        call.threshold, call.keep_scale = philox.threshold(update.dropout), 1 / (1 - update.dropout)
    if folding is not None:
        weight = _with_contiguous_rows(folding.weight[rows])
        call.weight, call.weight_stride, call.scale = weight.data_ptr(), weight.stride(0), folding.scale
        call.folded = folding.out[rows].data_ptr()
        if dtype.itemsize == 2:
            table, call.dither_start = dither_of(dtype, update.seed, rows.start * weight.shape[1])
            call.dither, call.dither_size = table.data_ptr(), table.numel()
    threads = min(torch.get_num_threads(), 1 + call.rows * call.columns // _ELEMENTS_OF_A_THREAD)
    compiled.genft_sweep(ctypes.byref(call), ctypes.c_int(threads))


def _rows(matrix: Tensor | None, rows: slice) -> Tensor | None:
    return None if matrix is None else matrix[rows]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
    """The library that the compiler (`CXX`, perhaps with arguments) makes; BuildError if there is none."""
    try:
        program, *arguments = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise BuildError(f"CXX is no command: {error}") from error
    if (path := shutil.which(program)) is None:
        raise BuildError(f"there is no C++ compiler: {program} is not found (CXX names another)")
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
    library.genft_sweep  # AttributeError if it is another  # noqa: B018
    return library
