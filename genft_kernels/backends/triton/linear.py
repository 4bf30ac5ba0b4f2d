"""The token side: extended K (factored), the update's tile in the main loop, fold, and the contraction epilogue.

A weight and its update stand as [out, in]. The forward product sums over in, the one for dx over out; both are
`tokens [T, n] times matrix [m, n]^T` with the strides of W or of W^T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...philox import ROUNDING_STREAM
from .launch import dropout_arguments, edge, matrix_block, precision, slices, unit_block
from .math import (
    activate,
    activation_slope,
    add_product,
    keep_tile,
    rank_k_tile,
    round_up_or_down,
    thin_rows,
    tile_of_program,
    word_tile,
)
from .tuned import bucket, tuned


@triton.jit
def _matrix_tile(matrix, rows, columns, n_rows, n_columns, stride_row, stride_column):
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    return tl.load(matrix + at, mask=mask, other=0.0)


@tuned("bucket", "m", "n", "k")
@triton.jit(do_not_specialize=["bucket"])
def _extended_k(
    tokens, matrix, bias, small, thin, out, t, bucket, m, n, k, stride_t, stride_n, stride_mm, stride_mn, scale,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [t, m] = tokens [t, n] matrix[m, n]^T + scale * small [t, k] thin[m, k]^T + bias, one accumulator."""
    row_tile, column_tile = tile_of_program(tl.cdiv(t, BLOCK_T), tl.cdiv(m, BLOCK_M))
    rows = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    total = rank_k_tile(small, thin, rows, columns, t, m, k, SLICES, PRECISION, BLOCK_T, BLOCK_M) * scale
    for start in range(0, n, BLOCK_N):
        inner = start + tl.arange(0, BLOCK_N)
        x = _matrix_tile(tokens, rows, inner, t, n, stride_t, stride_n)
        w = _matrix_tile(matrix, columns, inner, m, n, stride_mm, stride_mn).to(x.dtype)
        total = add_product(total, x, tl.trans(w), PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < m, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < t) & (columns[None, :] < m)
    at = rows[:, None].to(tl.int64) * m + columns[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _update_tile(
    b, h, key, rows, columns, n_out, n_in, k, threshold, keep_scale, stream,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """drop(psi(b h^T)) at (rows of out, columns of in), float32."""
    s = rank_k_tile(b, h, rows, columns, n_out, n_in, k, SLICES, PRECISION, BLOCK_OUT, BLOCK_IN)
    update = activate(s, ACTIVATION)
    if DROPOUT:
        update *= keep_tile(key, stream, rows, columns, n_out, threshold, keep_scale, BLOCK_OUT, BLOCK_IN)
    return update


# Four stages of a wide k would not fit into the shared memory of sm_80.
@tuned("bucket", "n_out", "n_in", "k", "ACTIVATION", "DROPOUT", "OVER_OUT", stages=(3, 2))
@triton.jit(do_not_specialize=["bucket"])
def _main_loop(
    tokens, weight, bias, b, h, seed, out, t, bucket, n_out, n_in, k, stride_t, stride_n, stride_wo, stride_wi,
    threshold, keep_scale, stream, scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, OVER_OUT: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tokens (W + scale * U)^T + bias, or with OVER_OUT tokens (W + scale * U); W is read once, U's tile made here."""
    tokens_at = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    kept = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n_kept = n_in if OVER_OUT else n_out
    n_summed = n_out if OVER_OUT else n_in
    key = tl.load(seed)
    total = tl.zeros((BLOCK_T, BLOCK), dtype=tl.float32)
    small = tl.zeros((BLOCK_T, BLOCK), dtype=tl.float32)
    for start in range(0, n_summed, BLOCK):
        summed = start + tl.arange(0, BLOCK)
        x = _matrix_tile(tokens, tokens_at, summed, t, n_summed, stride_t, stride_n)
        rows = summed if OVER_OUT else kept
        columns = kept if OVER_OUT else summed
        w = _matrix_tile(weight, rows, columns, n_out, n_in, stride_wo, stride_wi).to(x.dtype)
        update = _update_tile(
            b, h, key, rows, columns, n_out, n_in, k, threshold, keep_scale, stream,
            ACTIVATION, DROPOUT, PRECISION, SLICES, BLOCK, BLOCK,
        ).to(x.dtype)  # fmt: skip
        # Two products into float32: W + U would lose U in 16 bits.
        if OVER_OUT:
            total = add_product(total, x, w, PRECISION)
            small = add_product(small, x, update, PRECISION)
        else:
            total = add_product(total, x, tl.trans(w), PRECISION)
            small = add_product(small, x, tl.trans(update), PRECISION)
    total += scale * small
    if HAS_BIAS:
        total += tl.load(bias + kept, mask=kept < n_kept, other=0.0).to(tl.float32)[None, :]
    mask = (tokens_at[:, None] < t) & (kept[None, :] < n_kept)
    at = tokens_at[:, None].to(tl.int64) * n_kept + kept[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _fold(
    weight, b, h, seed, out, n_out, n_in, k, stride_wo, stride_wi, threshold, keep_scale, stream, rounding, scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, DROPPED_BITS: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """out [out, in] = W + scale * U, rounded stochastically where the dtype has fewer bits than float32."""
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    key = tl.load(seed)
    update = _update_tile(
        b, h, key, rows, columns, n_out, n_in, k, threshold, keep_scale, stream,
        ACTIVATION, DROPOUT, PRECISION, SLICES, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    # To the compute dtype first: a float32 W under autocast is the 16-bit W of that dtype.
    w = _matrix_tile(weight, rows, columns, n_out, n_in, stride_wo, stride_wi).to(out.dtype.element_ty).to(tl.float32)
    exact = w + scale * update
    if DROPPED_BITS > 0:
        words = word_tile(key, rounding, rows, columns, n_out, BLOCK_OUT, BLOCK_IN)
        exact = round_up_or_down(exact, words, DROPPED_BITS)
    mask = (rows[:, None] < n_out) & (columns[None, :] < n_in)
    at = rows[:, None].to(tl.int64) * n_in + columns[None, :]
    tl.store(out + at, exact.to(out.dtype.element_ty), mask=mask)


@tuned("bucket", "n_out", "n_in", "k", "ACTIVATION", "DROPOUT")
@triton.jit(do_not_specialize=["bucket"])
def _contract(
    dy, x, b, h, seed, dh, db, t, bucket, n_out, n_in, k, stride_dt, stride_do, stride_xt, stride_xi,
    threshold, keep_scale, stream, scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, NEED_H: tl.constexpr, NEED_B: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of G = dy^T x, contracted in the epilogue: P = scale * G * mask * psi'(b h^T), db += P h, dh += P^T b.

    Partial sums, added up afterwards in a fixed order: db [in tiles, out, k], dh [out tiles, in, k], float32.
    """
    out_tile, in_tile = tile_of_program(tl.cdiv(n_out, BLOCK_OUT), tl.cdiv(n_in, BLOCK_IN))
    rows = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = in_tile * BLOCK_IN + tl.arange(0, BLOCK_IN)
    g = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for start in range(0, t, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        grads = _matrix_tile(dy, tokens, rows, t, n_out, stride_dt, stride_do)
        inputs = _matrix_tile(x, tokens, columns, t, n_in, stride_xt, stride_xi)
        g = add_product(g, tl.trans(grads), inputs, PRECISION)
    s = rank_k_tile(b, h, rows, columns, n_out, n_in, k, SLICES, PRECISION, BLOCK_OUT, BLOCK_IN)
    p = scale * g * activation_slope(s, ACTIVATION)
    if DROPOUT:
        p *= keep_tile(tl.load(seed), stream, rows, columns, n_out, threshold, keep_scale, BLOCK_OUT, BLOCK_IN)
    for chunk in tl.static_range(CHUNKS):
        units = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        if NEED_B:
            left = thin_rows(h, columns, units, n_in, k)  # [in, k]
            part = tl.dot(p.to(left.dtype), left, input_precision=PRECISION)
            at = (in_tile * n_out + rows[:, None]).to(tl.int64) * k + units[None, :]
            tl.store(db + at, part, mask=(rows[:, None] < n_out) & (units[None, :] < k))
        if NEED_H:
            right = thin_rows(b, rows, units, n_out, k)  # [out, k]
            part = tl.dot(tl.trans(p.to(right.dtype)), right, input_precision=PRECISION)
            at = (out_tile * n_in + columns[:, None]).to(tl.int64) * k + units[None, :]
            tl.store(dh + at, part, mask=(columns[:, None] < n_in) & (units[None, :] < k))


_DROPPED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def extended_k(tokens, matrix, bias, small, thin, scale: float) -> Tensor:
    """tokens [T, n] matrix[m, n]^T + scale * small [T, k] thin[m, k]^T + bias: [T, m] in the tokens' dtype."""
    (t, n), m, k = tokens.shape, matrix.shape[0], thin.shape[1]
    out = tokens.new_empty((t, m))
    block = matrix_block(tokens)
    if t:
        _extended_k[(triton.cdiv(t, block) * triton.cdiv(m, block),)](
            tokens, matrix, bias, small.contiguous(), thin.contiguous(), out, t, bucket(t), m, n, k,
            *tokens.stride(), *matrix.stride(), scale,
            HAS_BIAS=bias is not None, PRECISION=precision(tokens), SLICES=slices(k),
            BLOCK_T=block, BLOCK_M=block, BLOCK_N=edge(tokens), num_warps=max(4, block // 16),
        )  # fmt: skip
    return out


def main_loop(tokens, weight, bias, h, b, seed, scale, activation, dropout, stream, over_out: bool) -> Tensor:
    """tokens [T, in] (W + scale * U)^T + bias, or with `over_out` tokens [T, out] (W + scale * U)."""
    (n_out, n_in), k, t = weight.shape, h.shape[1], tokens.shape[0]
    n_kept = n_in if over_out else n_out
    out = tokens.new_empty((t, n_kept))
    seed, threshold, keep_scale = dropout_arguments(dropout, seed, tokens.device)
    if t:
        block = edge(tokens)
        _main_loop[(triton.cdiv(t, 16), triton.cdiv(n_kept, block))](
            tokens, weight, bias, b.contiguous(), h.contiguous(), seed, out, t, bucket(t), n_out, n_in, k,
            *tokens.stride(), *weight.stride(), threshold, keep_scale, stream, scale,
            ACTIVATION=activation, DROPOUT=dropout > 0, HAS_BIAS=bias is not None, OVER_OUT=over_out,
            PRECISION=precision(tokens), SLICES=slices(k), BLOCK_T=16, BLOCK=block,
            num_warps=256 // block,  # float32 has smaller tiles, but all of their products in registers
        )  # fmt: skip
    return out


def fold(weight, h, b, seed, scale, activation, dropout, stream) -> Tensor:
    """W + scale * drop(psi(b h^T)) [out, in] in the factors' dtype."""
    (n_out, n_in), k = weight.shape, h.shape[1]
    out = h.new_empty((n_out, n_in))
    seed, threshold, keep_scale = dropout_arguments(dropout, seed, weight.device)
    block = edge(h)
    _fold[(triton.cdiv(n_out, block), triton.cdiv(n_in, block))](
        weight, b.contiguous(), h.contiguous(), seed, out, n_out, n_in, k, *weight.stride(),
        threshold, keep_scale, stream, ROUNDING_STREAM, scale,
        ACTIVATION=activation, DROPOUT=dropout > 0, DROPPED_BITS=_DROPPED_BITS[out.dtype],
        PRECISION=precision(h), SLICES=slices(k), BLOCK_OUT=block, BLOCK_IN=block, num_warps=4,
    )  # fmt: skip
    return out


def contract(dy, x, h, b, seed, scale, activation, dropout, stream, need_h: bool, need_b: bool):
    """(dh [in, k], db [out, k]) in the factors' dtype, None where not needed."""
    (t, n_out), n_in, k = dy.shape, x.shape[1], h.shape[1]
    # A wide epilogue leaves no registers for the larger tile.
    block = matrix_block(dy) if k <= 128 else edge(dy)
    out_tiles, in_tiles = triton.cdiv(n_out, block), triton.cdiv(n_in, edge(dy))
    dh = torch.empty((out_tiles, n_in, k), dtype=torch.float32, device=dy.device) if need_h else None
    db = torch.empty((in_tiles, n_out, k), dtype=torch.float32, device=dy.device) if need_b else None
    seed, threshold, keep_scale = dropout_arguments(dropout, seed, dy.device)
    _contract[(out_tiles * in_tiles,)](
        dy, x, b.contiguous(), h.contiguous(), seed, dh, db, t, bucket(t), n_out, n_in, k, *dy.stride(), *x.stride(),
        threshold, keep_scale, stream, scale,
        ACTIVATION=activation, DROPOUT=dropout > 0, NEED_H=need_h, NEED_B=need_b,
        PRECISION=precision(h), SLICES=slices(k), BLOCK_K=unit_block(k, h), CHUNKS=triton.cdiv(k, unit_block(k, h)),
        BLOCK_OUT=block, BLOCK_IN=edge(dy), BLOCK_T=edge(dy), num_warps=8,
    )  # fmt: skip
    return dh.sum(0).to(h.dtype) if need_h else None, db.sum(0).to(b.dtype) if need_b else None
