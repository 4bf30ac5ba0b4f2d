"""Fold the update into W: out = W + scale * U, U = drop(psi(b h^T)); both stand as [out, in]."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...philox import ROUNDING_STREAM
from ..launchers import Update
from .launch import ceil_divide, dropout_arguments, edge, named, precision, slices
from .math import key_of_layer, matrix_tile, round_up_or_down, update_tile, word_tile


@triton.jit(do_not_specialize_on_alignment=["seed"])  # an expert's is one of many, 8 bytes apart
def _fold(
    weight, b, h, seed, out, n_out, n_in, k, stride_wo, stride_wi, stride_oo, stride_oi,
    threshold, keep_scale, stream, rounding, scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, DROPPED_BITS: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """out [out, in] = W + scale * U, rounded stochastically where the dtype has fewer bits than float32."""
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    key = key_of_layer(seed, 0)
    update = update_tile(
        b, h, key, rows, columns, n_out, n_in, k, threshold, keep_scale, stream,
        ACTIVATION, DROPOUT, PRECISION, SLICES, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    # To the compute dtype first: a float32 W under autocast is the 16-bit W of that dtype.
    w = matrix_tile(weight, rows, columns, n_out, n_in, stride_wo, stride_wi).to(out.dtype.element_ty).to(tl.float32)
    exact = w + scale * update
    if DROPPED_BITS > 0:
        words = word_tile(key, rounding, rows, columns, n_out, BLOCK_OUT, BLOCK_IN)
        exact = round_up_or_down(exact, words, DROPPED_BITS)
    mask = (rows[:, None] < n_out) & (columns[None, :] < n_in)
    at = rows[:, None].to(tl.int64) * stride_oo + columns[None, :].to(tl.int64) * stride_oi
    tl.store(out + at, exact.to(out.dtype.element_ty), mask=mask)


_DROPPED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@named
def fold(weight: Tensor, update: Update, scale: float, out: Tensor) -> None:
    """Write W + scale * drop(psi(b h^T)) to `out` [out, in]."""
    b, h, activation, dropout, seed, stream = update
    (n_out, n_in), k = weight.shape, h.shape[1]
    block = edge(h)
    _fold[(ceil_divide(n_out, block), ceil_divide(n_in, block))](
        weight, b, h, seed, out, n_out, n_in, k, *weight.stride(), *out.stride(),
        *dropout_arguments(dropout), stream, ROUNDING_STREAM, scale,
        ACTIVATION=activation, DROPOUT=dropout > 0, DROPPED_BITS=_DROPPED_BITS[out.dtype],
        PRECISION=precision(h), SLICES=slices(k), BLOCK_OUT=block, BLOCK_IN=block, num_warps=4,
    )  # fmt: skip
