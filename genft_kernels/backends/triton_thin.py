"""Products of a big matrix and a thin one, with the activation on the thin side: `column`, x h, dy b, dh, db."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import precision, unit_block
from .triton_math import activate, activation_slope, thin_rows


@triton.jit
def _thin_product(
    matrix, thin, bias, out, pre, m, n, k, stride_m, stride_n, stride_tk, stride_tn,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [m, k] = activation(matrix [m, n] thin[k, n]^T + bias), and what the activation was applied to."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    z = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        inner = start + tl.arange(0, BLOCK_N)
        matrix_mask = (rows[:, None] < m) & (inner[None, :] < n)
        matrix_at = rows[:, None].to(tl.int64) * stride_m + inner[None, :].to(tl.int64) * stride_n
        tile = tl.load(matrix + matrix_at, mask=matrix_mask, other=0.0)
        thin_mask = (units[:, None] < k) & (inner[None, :] < n)
        thin_at = units[:, None].to(tl.int64) * stride_tk + inner[None, :].to(tl.int64) * stride_tn
        thin_tile = tl.load(thin + thin_at, mask=thin_mask, other=0.0)
        z = tl.dot(tile.to(thin_tile.dtype), tl.trans(thin_tile), z, input_precision=PRECISION)
    if HAS_BIAS:
        z += tl.load(bias + units, mask=units < k, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < m) & (units[None, :] < k)
    at = rows[:, None].to(tl.int64) * k + units[None, :]
    if ACTIVATION != "identity":
        z = z.to(pre.dtype.element_ty)  # the gradient will see the rounded z, so the activation does too
        tl.store(pre + at, z, mask=mask)
        z = z.to(tl.float32)
    tl.store(out + at, activate(z, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _thin_transposed(
    grad, pre, matrix, out, m, n, k, stride_m, stride_n, rows_per_program,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [split, k, n] = (grad * activation'(pre))[m, k]^T matrix [m, n], each split over its own rows."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    units = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for start in range(0, rows_per_program, BLOCK_M):
        rows = split * rows_per_program + start + tl.arange(0, BLOCK_M)
        dz = thin_rows(grad, rows, units, m, k)
        if ACTIVATION != "identity":
            z = thin_rows(pre, rows, units, m, k).to(tl.float32)
            dz = (dz.to(tl.float32) * activation_slope(z, ACTIVATION)).to(grad.dtype.element_ty)
        mask = (rows[:, None] < m) & (columns[None, :] < n)
        at = rows[:, None].to(tl.int64) * stride_m + columns[None, :].to(tl.int64) * stride_n
        tile = tl.load(matrix + at, mask=mask, other=0.0).to(dz.dtype)
        total = tl.dot(tl.trans(dz), tile, total, input_precision=PRECISION)
    mask = (units[:, None] < k) & (columns[None, :] < n)
    at = (split * k + units[:, None]).to(tl.int64) * n + columns[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def thin_product(matrix: Tensor, thin: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """(activation(matrix [m, n] thin[k, n]^T + bias [k]), its argument or None), both [m, k] in thin's dtype."""
    (m, n), k = matrix.shape, thin.shape[0]
    out = thin.new_empty((m, k))
    pre = None if activation == "identity" else torch.empty_like(out)
    if m:
        block_k = unit_block(k, thin)
        _thin_product[(triton.cdiv(m, 64), triton.cdiv(k, block_k))](
            matrix, thin, bias, out, pre, m, n, k, *matrix.stride(), *thin.stride(),
            ACTIVATION=activation, HAS_BIAS=bias is not None, PRECISION=precision(thin),
            BLOCK_M=64, BLOCK_N=64, BLOCK_K=block_k, num_warps=8,
        )  # fmt: skip
    return out, pre


def thin_transposed(grad: Tensor, matrix: Tensor, pre: Tensor | None, activation: str) -> Tensor:
    """(grad * activation'(pre))[m, k]^T matrix [m, n]: [k, n] float32, summed in a fixed order."""
    (m, n), k = matrix.shape, grad.shape[1]
    programs = triton.cdiv(n, 64)
    # Enough programs for a large card, but at least 512 rows for each.
    splits = max(1, min(triton.cdiv(256, programs), triton.cdiv(m, 512)))
    rows = triton.cdiv(triton.cdiv(m, splits), 64) * 64
    splits = max(1, triton.cdiv(m, max(rows, 1)))
    out = torch.empty((splits, k, n), dtype=torch.float32, device=grad.device)
    block_k = unit_block(k, grad)
    _thin_transposed[(programs, splits, triton.cdiv(k, block_k))](
        grad.contiguous(), pre, matrix, out, m, n, k, *matrix.stride(), rows,
        ACTIVATION=activation, PRECISION=precision(grad),
        BLOCK_M=64, BLOCK_N=64, BLOCK_K=block_k, num_warps=8,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)
