"""The operations of docs/method.md#kernels by hand-written kernels: what Triton and CUDA have in common.

A module of kernels offers `thin_product`, `thin_transposed`, `row_forward`, `row_backward`, `extended_k`, `main_loop`,
`fold` and `contract`, as `cuda_kernels` describes them.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import is_factored
from . import tuning as choices
from .eager import operations as eager


class KernelOperations:
    """`column`, `row`, `linear` and their `_backward`s, by the kernels of one module."""

    def __init__(self, kernels: ModuleType | SimpleNamespace):
        self._kernels = kernels

    def column(self, weights: list[Tensor], down: Tensor, bias: Tensor | None, activation: str):
        """h = phi(W A^T + a)  [L, out, k]."""
        return self._kernels.thin_product(weights, down, bias, activation)

    def column_backward(self, grad: Tensor, weights: list[Tensor], pre: Tensor, activation: str, needs: list[bool]):
        """dA = dZ^T W  [L, k, in], da = sum of dZ  [k]."""
        need_down, need_bias = needs
        ddown = self._kernels.thin_transposed(grad, weights, pre, activation).to(grad.dtype) if need_down else None
        if not need_bias:
            return ddown, None
        return ddown, eager.column_backward(grad, weights, pre, activation, [False, True])[1]

    def row(self, left, right, down, bias, seed, outer: str, dropout: float, inner: str):
        """h = phi(Y^T A^T + a)  [L, in, k]; factored, only k x k and thin products are left, which PyTorch does."""
        function = eager.row if is_factored(outer, dropout) else self._kernels.row_forward
        return function(left, right, down, bias, seed, outer, dropout, inner)

    def row_backward(self, grad, left, right, down, pre, seed, outer: str, dropout: float, inner: str, needs):
        """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k])."""
        function = eager.row_backward if is_factored(outer, dropout) else self._kernels.row_backward
        return function(grad, left, right, down, pre, seed, outer, dropout, inner, needs)

    def linear(self, x, weight, bias, h, b, seed, scale: float, activation: str, dropout: float, stream: int):
        """(y = x (W + scale * drop(psi(b h^T)))^T + bias  [..., out], x h  [tokens, k] in the factored form)."""
        tokens, xh = x.reshape(-1, x.shape[-1]), None  # [T, in]
        update = seed, scale, activation, dropout, stream
        factored, chosen = is_factored(activation, dropout), choices.choices_for(x.device)
        if factored:
            xh = self._thin(tokens, h)  # [T, k]
        if factored and not chosen.folds(tokens.shape[0], weight):
            y = self._kernels.extended_k(tokens, weight, bias, xh, b, scale)
        elif not factored and tokens.shape[0] <= chosen.main_loop_tokens:
            y = self._kernels.main_loop(tokens, weight, bias, h, b, *update, over_out=False)
        else:
            y = F.linear(tokens, self._kernels.fold(weight, h, b, *update), bias)
        return y.reshape(*x.shape[:-1], weight.shape[0]), xh

    def linear_backward(self, grad, x, weight, h, b, xh, seed, scale, activation, dropout, stream, needs):
        """(dx [..., in], dbias [out], dh [in, k], db [out, k])."""
        need_x, need_bias, need_h, need_b = needs
        dy = grad.reshape(-1, grad.shape[-1])  # [T, out]
        tokens = None if x is None else x.reshape(-1, x.shape[-1])  # [T, in]
        update = seed, scale, activation, dropout, stream
        factored, chosen = is_factored(activation, dropout), choices.choices_for(dy.device)
        dx = dh = db = None
        extends = factored and need_x and not chosen.folds(dy.shape[0], weight)
        if factored:
            dyb = self._thin(dy, b) if extends or need_h else None  # [T, k]
            if need_h:
                dh = self._thin_gradient(dyb, tokens, scale)
            if need_b:
                db = self._thin_gradient(xh, dy, scale)
        elif need_h or need_b:
            dh, db = self._kernels.contract(dy, tokens, h, b, *update, need_h, need_b)
        if extends:
            dx = self._kernels.extended_k(dy, weight.t(), None, dyb, h, scale)
        elif need_x and not factored and dy.shape[0] <= chosen.main_loop_tokens:
            dx = self._kernels.main_loop(dy, weight, None, h, b, *update, over_out=True)
        elif need_x:
            dx = dy @ self._kernels.fold(weight, h, b, *update)
        dx = dx.reshape(*grad.shape[:-1], dx.shape[-1]) if need_x else None
        dbias = dy.sum(0, dtype=torch.float32).to(grad.dtype) if need_bias else None
        return dx, dbias, dh, db

    def _thin(self, tokens: Tensor, factor: Tensor) -> Tensor:
        """tokens [T, n] factor [n, k]."""
        return self._kernels.thin_product([tokens], factor.t()[None], None, "identity")[0][0]

    def _thin_gradient(self, small: Tensor, tokens: Tensor, scale: float) -> Tensor:
        """scale * tokens^T [T, n] small [T, k]: [n, k], contiguous."""
        product = self._kernels.thin_transposed(small[None], [tokens], None, "identity")[0]  # [k, n]
        return product.t().mul(scale).to(small.dtype).contiguous()
