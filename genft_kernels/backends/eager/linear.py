"""The token side: y = x (W + scale * dW)^T + bias, factored or tiled (docs/method.md#two-products)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ...config import is_factored
from .factored import factored, factored_backward
from .fold import Folding
from .products import sum_of_rows
from .sweep import sweep
from .update_tile import Others, Update, Wanted


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    activation: str,
    dropout: float,
    stream: int,
) -> tuple[Tensor, Tensor | None]:
    """(y = x (W + scale * drop(psi(b h^T)))^T + bias  [..., out], scale * x h  [tokens, k], factored)."""
    tokens = x.reshape(-1, x.shape[-1])  # [T, in]
    weight = weight if weight.dtype == x.dtype and isinstance(weight, Tensor) else weight.to(x.dtype)  # [out, in]
    xh: Tensor | None = None
    if is_factored(activation, dropout):
        y, xh = factored(tokens, weight, bias, h, b, scale)
    else:
        y = _tiled(tokens, weight, bias, Update(b, h, activation, dropout, seed, stream), scale)
    return y.reshape(*x.shape[:-1], weight.shape[0]), xh


def linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    h: Tensor,
    b: Tensor,
    xh: Tensor | None,
    seed: Tensor | None,
    scale: float,
    activation: str,
    dropout: float,
    stream: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx [..., in], dbias [out], dh [in, k], db [out, k])."""
    need_x, need_bias, need_h, need_b = needs
    dy = grad.reshape(-1, grad.shape[-1])  # [T, out]
    tokens = None if x is None else x.reshape(-1, x.shape[-1])  # [T, in]
    multiplied = weight.to(grad.dtype) if need_x else None
    dx = dh = db = None
    if is_factored(activation, dropout):
        dx, dh, db = factored_backward(dy, tokens, multiplied, (h, b), xh, scale, (need_h, need_b))
    elif need_x or need_h or need_b:
        update = Update(b, h, activation, dropout, seed, stream)
        dx, dh, db = _tiled_backward(dy, tokens, multiplied, update, scale, need_h, need_b)
    dx = None if dx is None else dx.reshape(*grad.shape[:-1], dx.shape[-1])
    return dx, sum_of_rows(dy) if need_bias else None, dh, db


def _tiled(tokens: Tensor, weight: Tensor, bias: Tensor | None, update: Update, scale: float) -> Tensor:
    folding = Folding.of(weight, scale)
    sweep(update, folding=folding)
    return F.linear(tokens, folding.out, bias)


def _tiled_backward(
    dy: Tensor,
    tokens: Tensor | None,
    weight: Tensor | None,
    update: Update,
    scale: float,
    need_h: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dh, db). The gradient of U is dy^T x: a tile of it is formed, contracted with the factors, and dropped."""
    folding = None if weight is None else Folding.of(weight, scale)
    others = Others() if tokens is None or not (need_h or need_b) else Others(dy.t(), tokens.t())
    sums = sweep(update, others, Wanted(left=need_b, right=need_h), folding)
    dh, db = (None if grad is None else grad.mul_(scale).to(dy.dtype) for grad in (sums.right, sums.left))
    return None if folding is None else dy @ folding.out, dh, db
