"""The operations of docs/method.md#kernels by hand-written kernels: what Triton and CUDA have in common.

A module of kernels offers `thin_product`, `thin_transposed`, `row_forward`, `row_backward`, `fold` and `contract`, as
`cuda/kernels.py` describes them.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import is_factored
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
        ddown = self._kernels.thin_transposed(grad, weights, pre, activation) if need_down else None
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
        """(y = x (W + scale * drop(psi(b h^T)))^T + bias  [..., out], x h  [tokens, k] in the factored form).

        Factored, a vendor's products do it all. Tiled, the update is folded into W for one.
        """
        update = seed, scale, activation, dropout, stream
        if is_factored(activation, dropout):
            return eager.linear(x, weight, bias, h, b, *update)
        return F.linear(x, self._kernels.fold(weight, h, b, *update), bias), None

    def linear_backward(self, grad, x, weight, h, b, xh, seed, scale, activation, dropout, stream, needs):
        """(dx [..., in], dbias [out], dh [in, k], db [out, k])."""
        update = seed, scale, activation, dropout, stream
        if is_factored(activation, dropout):
            return eager.linear_backward(grad, x, weight, h, b, xh, *update, needs)
        need_x, need_bias, need_h, need_b = needs
        dy = grad.reshape(-1, grad.shape[-1])  # [T, out]
        dx = dh = db = None
        if need_h or need_b:
            dh, db = self._kernels.contract(dy, x.reshape(-1, x.shape[-1]), h, b, *update, need_h, need_b)
        if need_x:
            dx = grad @ self._kernels.fold(weight, h, b, *update)
        dbias = dy.sum(0, dtype=torch.float32).to(grad.dtype) if need_bias else None
        return dx, dbias, dh, db
