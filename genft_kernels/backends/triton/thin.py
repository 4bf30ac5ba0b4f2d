"""Products of big matrices and thin ones, for a list of layers: the column stage and its backward.

One launch serves L layers of one shape. Their big matrices lie anywhere in memory, so all but the first are found by
a table of offsets; what is thin is stacked.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launchers import Outcome
from .launch import ceil_divide, named, precision, stages, unit_block
from .math import activate, add_product, matrix_tile, thin_rows


@triton.jit
def _matrix_of_layer(first, offsets, layer, DIVISIBILITY: tl.constexpr):
    """Where the layer's matrix begins, as an offset in elements from the first one's; one layer needs no offsets."""
    if offsets is None:
        return first
    else:
        return first + tl.multiple_of(tl.load(offsets + layer), DIVISIBILITY)


@triton.jit
def _thin_product(
    first, offsets, thins, bias, outs, pres, layers, m, n, k, stride_m, stride_n, columns_per_split,
    DIVISIBILITY: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [split, m, k] = activation(matrix [m, n] thin[k, n]^T + bias), and what the activation was applied to.

    Each split has its own columns; where there are several, `outs` gets float32 parts, without bias and activation.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    split, layer = tl.program_id(2) // layers, tl.program_id(2) % layers
    matrix = _matrix_of_layer(first, offsets, layer, DIVISIBILITY)
    thin = thins + layer.to(tl.int64) * k * n
    z = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    # A loop that may have no step makes ptxas wait for each matrix instruction (C7515).
    tl.assume(columns_per_split > 0)
    for start in range(0, columns_per_split, BLOCK_N):
        inner = split * columns_per_split + start + tl.arange(0, BLOCK_N)
        tile = matrix_tile(matrix, rows, inner, m, n, stride_m, stride_n)
        thin_tile = thin_rows(thin, units, inner, k, n)  # [k, n]
        z = add_product(z, tile.to(thin_tile.dtype), tl.trans(thin_tile), PRECISION)
    if bias is not None:
        z += tl.load(bias + units, mask=units < k, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < m) & (units[None, :] < k)
    at = (tl.program_id(2).to(tl.int64) * m + rows[:, None]) * k + units[None, :]
    if ACTIVATION != "identity":
        z = z.to(pres.dtype.element_ty)  # the gradient will see the rounded z, so the activation does too
        tl.store(pres + at, z, mask=mask)
        z = z.to(tl.float32)
    tl.store(outs + at, activate(z, ACTIVATION).to(outs.dtype.element_ty), mask=mask)


@triton.jit
def _thin_transposed(
    dzs, first, offsets, outs, layers, m, n, k, stride_m, stride_n, rows_per_split,
    DIVISIBILITY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [split, k, n] = dz[m, k]^T matrix [m, n], each split over its own rows."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    split, layer = tl.program_id(2) // layers, tl.program_id(2) % layers
    matrix = _matrix_of_layer(first, offsets, layer, DIVISIBILITY)
    dz = dzs + layer.to(tl.int64) * m * k
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    tl.assume(rows_per_split > 0)  # a loop that may have no step makes ptxas wait for each matrix instruction (C7515)
    for start in range(0, rows_per_split, BLOCK_M):
        rows = split * rows_per_split + start + tl.arange(0, BLOCK_M)
        small = matrix_tile(dz, units, rows, k, m, 1, k)  # [k, rows], as the product takes it
        tile = matrix_tile(matrix, rows, columns, m, n, stride_m, stride_n)
        total = add_product(total, small, tile.to(small.dtype), PRECISION)
    mask = (units[:, None] < k) & (columns[None, :] < n)
    at = (tl.program_id(2).to(tl.int64) * k + units[:, None]) * n + columns[None, :]
    tl.store(outs + at, total.to(outs.dtype.element_ty), mask=mask)


@named
def thin_product(matrices: list[Tensor], thin: Tensor, outcome: Outcome, columns: int) -> None:
    """Write activation(matrix [m, n] thin[k, n]^T + bias), a part for each `columns` columns: [part x L, m, k]."""
    matrices, (out, bias, activation, pre) = _alike(matrices), outcome
    (m, n), (layers, k, _) = matrices[0].shape, thin.shape
    block_k = unit_block(k, thin)
    offsets, divisibility = _offsets(matrices)
    _thin_product[(ceil_divide(m, 64), ceil_divide(k, block_k), layers * ceil_divide(n, columns))](
        matrices[0], offsets, thin, bias, out, pre, layers, m, n, k, *matrices[0].stride(), columns,
        DIVISIBILITY=divisibility, ACTIVATION=activation, PRECISION=precision(thin),
        BLOCK_M=64, BLOCK_N=64, BLOCK_K=block_k, num_warps=8, num_stages=stages(thin, 5, 64 * (64 + block_k)),
    )  # fmt: skip


@named
def thin_transposed(dz: Tensor, matrices: list[Tensor], out: Tensor, rows: int) -> None:
    """Write dz [L, m, k]^T matrix [m, n], a part for each `rows` rows, to `out` [part x L, k, n]."""
    matrices = _alike(matrices)
    (m, n), (layers, _, k) = matrices[0].shape, dz.shape
    block_k = unit_block(k, dz)
    offsets, divisibility = _offsets(matrices)
    _thin_transposed[(ceil_divide(n, 64), ceil_divide(k, block_k), layers * ceil_divide(m, rows))](
        dz, matrices[0], offsets, out, layers, m, n, k, *matrices[0].stride(), rows,
        DIVISIBILITY=divisibility, PRECISION=precision(dz),
        BLOCK_M=64, BLOCK_N=64, BLOCK_K=block_k, num_warps=8, num_stages=stages(dz, 4, 64 * (64 + block_k)),
    )  # fmt: skip


def _alike(matrices: list[Tensor]) -> list[Tensor]:
    """The matrices with the same strides and dtype; they differ so rarely that a copy will do."""
    first = matrices[0]
    if all(matrix.stride() == first.stride() and matrix.dtype == first.dtype for matrix in matrices):
        return matrices
    return list(torch.stack([matrix.to(first.dtype) for matrix in matrices]))


def _offsets(matrices: list[Tensor]) -> tuple[Tensor | None, int]:
    """(each matrix's distance from the first in elements, int64 [L], and what divides all of them).

    The table keeps nothing alive: the caller holds on to `matrices` until the launch.
    """
    if len(matrices) == 1:
        return None, 1
    size, begin = matrices[0].dtype.itemsize, matrices[0].data_ptr()
    distances = tuple((matrix.data_ptr() - begin) // size for matrix in matrices)
    aligned = 16 // size  # to the 16 bytes that one load takes
    return _table(distances, matrices[0].device), aligned if all(d % aligned == 0 for d in distances) else 1


@functools.lru_cache(maxsize=1024)
def _table(distances: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device, and kept: nothing is uploaded in the steady state, or while a graph is captured."""
    return torch.tensor(distances, dtype=torch.int64, device=device)
