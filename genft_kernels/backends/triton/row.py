"""The row stage in its tiled form, flash style: h = phi(Y^T A^T + a), Y = drop(psi(left right^T)), never stored.

`left` [n_out, k1] and `right` [n_in, k1] make a tile of Y [out, in]; `down` is A [k, n_out].
One launch serves L layers: each of these is stacked, and a program belongs to one layer.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launchers import Outcome, Update
from .launch import ceil_divide, dropout_arguments, edge_at, named, precision, slices, unit_block
from .math import (
    activate,
    activation_slope,
    add_product,
    keep_tile,
    key_of_layer,
    matrix_tile,
    rank_k_tile,
    thin_rows,
    update_tile,
)


@triton.jit
def _row_forward(
    left, right, down, bias, seed, out, pre, n_out, n_in, k1, k, threshold, keep_scale, stream,
    OUTER: tl.constexpr, INNER: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, SLICES_1: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    units = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    layer = tl.program_id(2).to(tl.int64)
    key = key_of_layer(seed, layer)
    left, right, down = left + layer * n_out * k1, right + layer * n_in * k1, down + layer * n_out * k
    z = tl.zeros((BLOCK_IN, BLOCK_K), dtype=tl.float32)
    tl.assume(n_out > 0)  # a loop that may have no step makes ptxas wait for each matrix instruction (C7515)
    for start in range(0, n_out, BLOCK_OUT):
        rows = start + tl.arange(0, BLOCK_OUT)
        y = update_tile(
            left, right, key, rows, columns, n_out, n_in, k1, threshold, keep_scale, stream,
            OUTER, DROPOUT, PRECISION, SLICES_1, BLOCK_OUT, BLOCK_IN,
        )  # [out, in]  # fmt: skip
        a = matrix_tile(down, rows, units, n_out, k, 1, n_out)  # [out, k]
        z = add_product(z, tl.trans(y.to(a.dtype)), a, PRECISION)
    if bias is not None:
        z += tl.load(bias + units, mask=units < k, other=0.0).to(tl.float32)[None, :]
    mask = (columns[:, None] < n_in) & (units[None, :] < k)
    at = (layer * n_in + columns[:, None]) * k + units[None, :]
    if INNER != "identity":
        z = z.to(pre.dtype.element_ty)
        tl.store(pre + at, z, mask=mask)
        z = z.to(tl.float32)
    tl.store(out + at, activate(z, INNER).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _row_tile(
    left, right, down, dz, key, rows, columns, n_out, n_in, k1, k, threshold, keep_scale, stream,
    OUTER: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICES_1: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """A tile of Y and of Q = dY * mask * psi'(left right^T), dY = A^T dZ^T; both [out, in], float32."""
    s = rank_k_tile(left, right, rows, columns, n_out, n_in, k1, SLICES_1, PRECISION, BLOCK_OUT, BLOCK_IN)
    dy = rank_k_tile(down, dz, rows, columns, n_out, n_in, k, SLICES, PRECISION, BLOCK_OUT, BLOCK_IN, True)
    y, q = activate(s, OUTER), dy * activation_slope(s, OUTER)
    if DROPOUT:
        keep = keep_tile(key, stream, rows, columns, n_out, threshold, keep_scale, BLOCK_OUT, BLOCK_IN)
        y, q = y * keep, q * keep
    return y, q


@triton.jit
def _row_backward_out(
    left, right, down, dz, seed, dleft, ddown, n_out, n_in, k1, k, threshold, keep_scale, stream,
    OUTER: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICES_1: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """dleft = Q right  [out, k1],  dA = (Y dZ)^T  [k, out]: a program has its rows of both."""
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    units_1 = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # k1 is k, or k + 1 with the bias unit
    units = units_1
    layer = tl.program_id(2).to(tl.int64)
    key = key_of_layer(seed, layer)
    left, right, down = left + layer * n_out * k1, right + layer * n_in * k1, down + layer * n_out * k
    dz += layer * n_in * k
    to_left = tl.zeros((BLOCK_OUT, BLOCK_K), dtype=tl.float32)
    to_down = tl.zeros((BLOCK_OUT, BLOCK_K), dtype=tl.float32)
    tl.assume(n_in > 0)  # as in `_row_forward`
    for start in range(0, n_in, BLOCK_IN):
        columns = start + tl.arange(0, BLOCK_IN)
        y, q = _row_tile(
            left, right, down, dz, key, rows, columns, n_out, n_in, k1, k, threshold, keep_scale, stream,
            OUTER, DROPOUT, PRECISION, SLICES_1, SLICES, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        r = thin_rows(right, columns, units_1, n_in, k1)  # [in, k1]
        to_left = add_product(to_left, q.to(r.dtype), r, PRECISION)
        d = thin_rows(dz, columns, units, n_in, k)  # [in, k]
        to_down = add_product(to_down, y.to(d.dtype), d, PRECISION)
    inside = rows[:, None] < n_out
    if dleft is not None:
        at = (layer * n_out + rows[:, None]) * k1 + units_1[None, :]
        tl.store(dleft + at, to_left.to(dleft.dtype.element_ty), mask=inside & (units_1[None, :] < k1))
    if ddown is not None:
        at = (layer * k + units[None, :]) * n_out + rows[:, None]
        tl.store(ddown + at, to_down.to(ddown.dtype.element_ty), mask=inside & (units[None, :] < k))


@triton.jit
def _row_backward_in(
    left, right, down, dz, seed, dright, n_out, n_in, k1, k, threshold, keep_scale, stream,
    OUTER: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICES_1: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """dright = Q^T left  [in, k1]: a program has its columns of Q."""
    columns = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    units_1 = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    layer = tl.program_id(2).to(tl.int64)
    key = key_of_layer(seed, layer)
    left, right, down = left + layer * n_out * k1, right + layer * n_in * k1, down + layer * n_out * k
    dz += layer * n_in * k
    total = tl.zeros((BLOCK_IN, BLOCK_K), dtype=tl.float32)
    tl.assume(n_out > 0)  # a loop that may have no step makes ptxas wait for each matrix instruction (C7515)
    for start in range(0, n_out, BLOCK_OUT):
        rows = start + tl.arange(0, BLOCK_OUT)
        _, q = _row_tile(
            left, right, down, dz, key, rows, columns, n_out, n_in, k1, k, threshold, keep_scale, stream,
            OUTER, DROPOUT, PRECISION, SLICES_1, SLICES, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        a = thin_rows(left, rows, units_1, n_out, k1)  # [out, k1]
        total = add_product(total, tl.trans(q.to(a.dtype)), a, PRECISION)
    mask = (columns[:, None] < n_in) & (units_1[None, :] < k1)
    at = (layer * n_in + columns[:, None]) * k1 + units_1[None, :]
    tl.store(dright + at, total.to(dright.dtype.element_ty), mask=mask)


@named
def row_forward(y: Update, down: Tensor, outcome: Outcome) -> None:
    """Write h = phi(Y^T A^T + a)  [L, in, k]."""
    (left, right, outer, dropout, seed, stream), (out, bias, inner, pre) = y, outcome
    (layers, n_out, k1), n_in, k = left.shape, right.shape[1], down.shape[1]
    block_k, block = unit_block(k, left), edge_at(k1, left)
    _row_forward[(ceil_divide(n_in, block), ceil_divide(k, block_k), layers)](
        left, right, down, bias, seed, out, pre,
        n_out, n_in, k1, k, *dropout_arguments(dropout), stream,
        OUTER=outer, INNER=inner, DROPOUT=dropout > 0, PRECISION=precision(left),
        SLICES_1=slices(k1), BLOCK_K=block_k, BLOCK_OUT=block, BLOCK_IN=block,
        num_warps=4, num_stages=2 if left.dtype.itemsize == 2 else 1,  # in float32 a second one fills the registers
    )  # fmt: skip


@named
def row_backward(
    y: Update, down: Tensor, dz: Tensor, dleft: Tensor | None, dright: Tensor | None, ddown: Tensor | None
) -> None:
    """Write the gradients of left, right and down to `dleft`, `dright` and `ddown`, those that are not None."""
    left, right, outer, dropout, seed, stream = y
    (layers, n_out, k1), n_in, k = left.shape, right.shape[1], down.shape[1]
    thin = (left, right, down, dz, seed)
    numbers = (n_out, n_in, k1, k, *dropout_arguments(dropout), stream)
    block_k, block = unit_block(max(k, k1), left), edge_at(max(k, k1), left)
    chunks = ceil_divide(max(k, k1), block_k)
    settings = dict(
        OUTER=outer, DROPOUT=dropout > 0, PRECISION=precision(left), SLICES_1=slices(k1), SLICES=slices(k),
        BLOCK_K=block_k, num_warps=8, num_stages=1,
    )  # fmt: skip
    if dleft is not None or ddown is not None:
        _row_backward_out[(ceil_divide(n_out, block), chunks, layers)](
            *thin, dleft, ddown, *numbers, BLOCK_OUT=block, BLOCK_IN=32, **settings
        )
    if dright is not None:
        # In float32 any larger tile spills for some k, on one card or another.
        height, width = (32, block) if left.dtype.itemsize == 2 else (16, 16)
        _row_backward_in[(ceil_divide(n_in, width), chunks, layers)](
            *thin, dright, *numbers, BLOCK_OUT=height, BLOCK_IN=width, **settings
        )
