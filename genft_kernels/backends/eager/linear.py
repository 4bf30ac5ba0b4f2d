"""The token side: y = x (W + scale * dW)^T + bias, factored or tiled (docs/method.md#two-products)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import is_factored
from .contract import contract_and_fold
from .fold import fold
from .products import is_16_bit, scaled_product, sum_of_rows, sum_over_tokens
from .update_tile import Update


def linear(x, weight, bias, h, b, seed, scale: float, activation: str, dropout: float, stream: int):
    """(y = x (W + scale * drop(psi(b h^T)))^T + bias  [..., out], x h  [tokens, k] in the factored form)."""
    tokens = x.reshape(-1, x.shape[-1])  # [T, in]
    weight = weight if weight.dtype == x.dtype and isinstance(weight, Tensor) else weight.to(x.dtype)  # [out, in]
    if is_factored(activation, dropout):
        y, xh = _factored(tokens, weight, bias, h, b, scale)
    else:
        y, xh = F.linear(tokens, fold(weight, Update(b, h, activation, dropout, seed, stream), scale), bias), None
    return y.reshape(*x.shape[:-1], weight.shape[0]), xh


def linear_backward(grad, x, weight, h, b, xh, seed, scale, activation, dropout, stream, needs):
    """(dx [..., in], dbias [out], dh [in, k], db [out, k])."""
    need_x, need_bias, need_h, need_b = needs
    dy = grad.reshape(-1, grad.shape[-1])  # [T, out]
    tokens = None if x is None else x.reshape(-1, x.shape[-1])  # [T, in]
    weight = weight.to(grad.dtype) if need_x else None
    dx = dh = db = None
    if is_factored(activation, dropout):
        dx, dh, db = _factored_backward(dy, tokens, weight, h, b, xh, scale, need_x, need_h, need_b)
    elif need_x or need_h or need_b:
        update = Update(b, h, activation, dropout, seed, stream)
        dx, dh, db = contract_and_fold(dy, tokens, weight, update, scale, need_h, need_b)
    dx = dx.reshape(*grad.shape[:-1], dx.shape[-1]) if need_x else None
    return dx, sum_of_rows(dy) if need_bias else None, dh, db


# Added to a y that is rounded to 16 bits, half of a small update is lost (docs/method.md#precision). There the small
# product goes first on a CPU, and the big one is added onto it in float32. cuBLAS rounds the big one before it adds: on
# a GPU both are one product with a longer inner dimension.


def _extends(tensor: Tensor) -> bool:
    """Whether both products must be one: in 16 bits, but for a CPU."""
    return is_16_bit(tensor) and tensor.device.type != "cpu"


def _factored(tokens, weight, bias, h, b, scale):
    xh = tokens @ h  # [T, k]
    if not is_16_bit(tokens):
        return F.linear(tokens, weight, bias).addmm_(xh, b.t(), alpha=scale), xh
    if _extends(tokens):
        return F.linear(torch.cat([tokens, xh], 1), torch.cat([weight, b * scale], 1), bias), xh
    y = scaled_product(xh, b.t(), scale).addmm_(tokens, weight.t())
    # A bias would swallow the small product; what is rounded a second time has the update in it.
    return (y if bias is None else y.add_(bias)), xh


def _factored_backward(dy, tokens, weight, h, b, xh, scale, need_x, need_h, need_b):
    dx = dyb = None
    if need_x or need_h:
        dyb = dy @ b  # [T, k]
    dh = sum_over_tokens(tokens, dyb, scale) if need_h else None
    db = sum_over_tokens(dy, xh, scale) if need_b else None
    if need_x and _extends(dy):
        dx = torch.cat([dy, dyb], 1) @ torch.cat([weight, h.t() * scale], 0)
    elif need_x:
        dx = scaled_product(dyb, h.t(), scale).addmm_(dy, weight)
    return dx, dh, db
