"""The operations by Triton kernels, for NVIDIA GPUs from sm_80 on; float32, float16 and bfloat16.

Every sum has a fixed order, so the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import is_factored
from . import eager
from .triton_linear import contract, extended_k, fold, main_loop
from .triton_row import row_backward as _tiled_row_backward
from .triton_row import row_forward as _tiled_row_forward
from .triton_thin import thin_product, thin_transposed

# Up to this many tokens W is read once and the update's tile made on the way; beyond, a folded W feeds a vendor GEMM.
_MAIN_LOOP_TOKENS = 128


def column(weights: list[Tensor], down: Tensor, bias: Tensor | None, activation: str):
    """h = phi(W A^T + a)  [L, out, k]."""
    return thin_product(weights, down, bias, activation)


def column_backward(grad: Tensor, weights: list[Tensor], pre: Tensor, activation: str, needs: list[bool]):
    """dA = dZ^T W  [L, k, in], da = sum of dZ  [k]."""
    need_down, need_bias = needs
    ddown = thin_transposed(grad, weights, pre, activation).to(grad.dtype) if need_down else None
    if not need_bias:
        return ddown, None
    return ddown, eager.column_backward(grad, weights, pre, activation, [False, True])[1]


def row(left, right, down, bias, seed, outer: str, dropout: float, inner: str):
    """h = phi(Y^T A^T + a)  [L, in, k]; factored, only k x k and thin products are left, which PyTorch does."""
    if is_factored(outer, dropout):
        return eager.row(left, right, down, bias, seed, outer, dropout, inner)
    return _tiled_row_forward(left, right, down, bias, seed, outer, dropout, inner)


def row_backward(grad, left, right, down, pre, seed, outer: str, dropout: float, inner: str, needs: list[bool]):
    """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k])."""
    function = eager.row_backward if is_factored(outer, dropout) else _tiled_row_backward
    return function(grad, left, right, down, pre, seed, outer, dropout, inner, needs)


def linear(x, weight, bias, h, b, seed, scale: float, activation: str, dropout: float, stream: int):
    """(y = x (W + scale * drop(psi(b h^T)))^T + bias  [..., out], x h  [tokens, k] in the factored form)."""
    tokens, xh = x.reshape(-1, x.shape[-1]), None  # [T, in]
    if is_factored(activation, dropout):
        xh = _thin(tokens, h)  # [T, k]
        y = extended_k(tokens, weight, bias, xh, b, scale)
    elif tokens.shape[0] <= _MAIN_LOOP_TOKENS:
        y = main_loop(tokens, weight, bias, h, b, seed, scale, activation, dropout, stream, over_out=False)
    else:
        y = F.linear(tokens, fold(weight, h, b, seed, scale, activation, dropout, stream), bias)
    return y.reshape(*x.shape[:-1], weight.shape[0]), xh


def linear_backward(grad, x, weight, h, b, xh, seed, scale, activation, dropout, stream, needs):
    """(dx [..., in], dbias [out], dh [in, k], db [out, k])."""
    need_x, need_bias, need_h, need_b = needs
    dy = grad.reshape(-1, grad.shape[-1])  # [T, out]
    tokens = None if x is None else x.reshape(-1, x.shape[-1])  # [T, in]
    dx = dh = db = None
    if is_factored(activation, dropout):
        dyb = _thin(dy, b) if need_x or need_h else None  # [T, k]
        if need_x:
            dx = extended_k(dy, weight.t(), None, dyb, h, scale)
        if need_h:
            dh = _thin_gradient(dyb, tokens, scale)
        if need_b:
            db = _thin_gradient(xh, dy, scale)
    else:
        if need_x and dy.shape[0] <= _MAIN_LOOP_TOKENS:
            dx = main_loop(dy, weight, None, h, b, seed, scale, activation, dropout, stream, over_out=True)
        elif need_x:
            dx = dy @ fold(weight, h, b, seed, scale, activation, dropout, stream)
        if need_h or need_b:
            dh, db = contract(dy, tokens, h, b, seed, scale, activation, dropout, stream, need_h, need_b)
    dx = dx.reshape(*grad.shape[:-1], dx.shape[-1]) if need_x else None
    dbias = dy.sum(0, dtype=torch.float32).to(grad.dtype) if need_bias else None
    return dx, dbias, dh, db


def _thin(tokens: Tensor, factor: Tensor) -> Tensor:
    """tokens [T, n] factor [n, k]."""
    return thin_product([tokens], factor.t()[None], None, "identity")[0][0]


def _thin_gradient(small: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """scale * tokens^T [T, n] small [T, k]: [n, k], contiguous."""
    product = thin_transposed(small[None], [tokens], None, "identity")[0]  # [k, n]
    return product.t().mul(scale).to(small.dtype).contiguous()
