"""The gradients of the update's factors, tiled form: a tile of G = dy^T x is contracted and never stored."""

import triton
import triton.language as tl
from torch import Tensor

from ..launchers import Pair, Update
from .launch import ceil_divide, dropout_arguments, edge, named, precision, slices, stages
from .math import (
    SLICE,
    activation_slope,
    add_product,
    keep_tile,
    key_of_layer,
    matrix_tile,
    rank_k_tile,
    thin_rows,
    tile_of_program,
)


@triton.jit(do_not_specialize=["t", "tokens_per_split"], do_not_specialize_on_alignment=["seed"])  # as `_fold`
def _contract(
    dy, x, b, h, seed, dh, db, t, tokens_per_split, n_out, n_in, k, stride_dt, stride_do, stride_xt, stride_xi,
    threshold, keep_scale, stream, scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of G = dy^T x, contracted in the epilogue: P = scale * G * mask * psi'(b h^T), db += P h, dh += P^T b.

    G is linear in the tokens, so each split has its own. Partial sums, added up afterwards in a fixed order:
    db [split, in tile, out, k], dh [split, out tile, in, k], float32.
    """
    # A loop that may have no step makes ptxas wait for each matrix instruction (C7515).
    tl.assume(tokens_per_split > 0)
    split, out_tiles, in_tiles = tl.program_id(1), tl.cdiv(n_out, BLOCK_OUT), tl.cdiv(n_in, BLOCK_IN)
    out_tile, in_tile = tile_of_program(out_tiles, in_tiles)
    rows = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = in_tile * BLOCK_IN + tl.arange(0, BLOCK_IN)
    g = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for start in range(0, tokens_per_split, BLOCK_T):
        tokens = split * tokens_per_split + start + tl.arange(0, BLOCK_T)
        grads = matrix_tile(dy, rows, tokens, n_out, t, stride_do, stride_dt)  # [out, T], as the product takes it
        inputs = matrix_tile(x, tokens, columns, t, n_in, stride_xt, stride_xi)
        g = add_product(g, grads, inputs, PRECISION)
    s = rank_k_tile(b, h, rows, columns, n_out, n_in, k, SLICES, PRECISION, BLOCK_OUT, BLOCK_IN)
    g *= scale * activation_slope(s, ACTIVATION)
    if DROPOUT:
        g *= keep_tile(key_of_layer(seed, 0), stream, rows, columns, n_out, threshold, keep_scale, BLOCK_OUT, BLOCK_IN)
    p = g.to(h.dtype.element_ty)
    for chunk in tl.static_range(CHUNKS):
        units = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        if db is not None:
            left = thin_rows(h, columns, units, n_in, k)  # [in, k]
            part = tl.dot(p, left, input_precision=PRECISION)
            at = ((split * in_tiles + in_tile) * n_out + rows[:, None]).to(tl.int64) * k + units[None, :]
            tl.store(db + at, part, mask=(rows[:, None] < n_out) & (units[None, :] < k))
        if dh is not None:
            right = thin_rows(b, rows, units, n_out, k)  # [out, k]
            part = tl.dot(tl.trans(p), right, input_precision=PRECISION)
            at = ((split * out_tiles + out_tile) * n_in + columns[:, None]).to(tl.int64) * k + units[None, :]
            tl.store(dh + at, part, mask=(columns[:, None] < n_in) & (units[None, :] < k))


@named
def contract(dy: Tensor, x: Tensor, update: Update, scale: float, parts: Pair, tokens: int) -> None:
    """Write the parts of dh [split and out tile, in, k] and db [split and in tile, out, k], those that are not None."""
    (b, h, activation, dropout, seed, stream), (dh, db) = update, parts
    (t, n_out), (n_in, k) = dy.shape, h.shape
    block_out, block_in = tile_of_contract(dy, k, activation, dropout)
    # No more units at once than divide k, and few where a tile of G fills the registers.
    block_t, block_k = edge(dy), 32 if k % 32 == 0 and block_in < 128 else SLICE
    tiles = ceil_divide(n_out, block_out) * ceil_divide(n_in, block_in)
    _contract[(tiles, max(1, ceil_divide(t, tokens)))](
        dy, x, b, h, seed, dh, db, t, tokens, n_out, n_in, k,
        *dy.stride(), *x.stride(), *dropout_arguments(dropout), stream, scale,
        ACTIVATION=activation, DROPOUT=dropout > 0,
        PRECISION=precision(h), SLICES=slices(k), BLOCK_K=block_k, CHUNKS=ceil_divide(k, block_k),
        BLOCK_OUT=block_out, BLOCK_IN=block_in, BLOCK_T=block_t, num_warps=8,
        num_stages=stages(dy, 4, (block_out + block_in) * block_t),
    )  # fmt: skip


def tile_of_contract(dy: Tensor, k: int, activation: str, dropout: float) -> tuple[int, int]:
    """Edges of a tile of G. The larger, the less is read; but the epilogue must find registers, or it spills."""
    small = edge(dy)
    if dy.dtype.itemsize == 4 or dy.shape[0] < 128 or k > 128:
        return small, small
    light = k <= 48 and k % 16 == 0 and (dropout == 0 or activation in ("identity", "relu", "leaky_relu"))
    return 128, 128 if light else small
