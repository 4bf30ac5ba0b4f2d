"""The token side of the factored form: a big product and two thin ones (docs/method.md#factored-form).

Added to a y that is rounded to 16 bits, half of a small update is lost (docs/method.md#precision), and cuBLAS rounds a
product before it adds. So in 16 bits both products are one with a longer inner dimension: [x | x h] [W | b]^T. On a CPU
that is also quickest where tokens are many, by a tenth of a layer's forward and backward at 4,096; where they are few,
copies of W take longer than a second pass over y, and the big product is added onto the small one, in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import is_16_bit, scaled_product, sum_over_tokens
from .scratch import scratch

_MANY = 2  # tokens for each row of W that is copied
_MULTIPLE = 32  # of a CPU's inner dimension: rows then begin where a product with tiles likes them to


def factored(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y [T, out], x h [T, k])."""
    xh = tokens @ h
    if not is_16_bit(tokens):
        return F.linear(tokens, weight, bias).addmm_(xh, b.t(), alpha=scale), xh
    if _extends(tokens, weight):
        return F.linear(_joined("tokens", tokens, xh, 1), _joined("weights", weight, b * scale, 1), bias), xh
    y = scaled_product(xh, b.t(), scale).addmm_(tokens, weight.t())
    # A bias would swallow the small product; what is rounded a second time has the update in it.
    return (y if bias is None else y.add_(bias)), xh


def factored_backward(
    dy: Tensor,
    tokens: Tensor | None,
    weight: Tensor | None,
    factors: tuple[Tensor, Tensor],
    xh: Tensor | None,
    scale: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [T, in], or None without `weight`; dh [in, k] and db [out, k], those that `needs` names)."""
    (h, b), (need_h, need_b) = factors, needs
    dyb = dy @ b if need_h or weight is not None else None  # [T, k]
    dx = dh = db = None
    if need_h and tokens is not None and dyb is not None:
        dh = sum_over_tokens(tokens, dyb, scale)
    if need_b and xh is not None:
        db = sum_over_tokens(dy, xh, scale)
    if weight is not None and dyb is not None:
        if _extends(dy, weight):
            dx = _joined("tokens", dy, dyb, 1) @ _joined("weights", weight, h.t() * scale, 0)
        else:
            dx = scaled_product(dyb, h.t(), scale).addmm_(dy, weight)
    return dx, dh, db


def _extends(tokens: Tensor, weight: Tensor) -> bool:
    return is_16_bit(tokens) and (tokens.device.type != "cpu" or tokens.shape[0] >= _MANY * weight.shape[0])


def _joined(slot: str, left: Tensor, right: Tensor, dim: int) -> Tensor:
    """left | right along `dim`; on a CPU in scratch memory, with zeros up to a round number."""
    if left.device.type != "cpu":
        return torch.cat([left, right], dim)
    shape = list(left.shape)
    shape[dim] = -(left.shape[dim] + right.shape[dim]) % _MULTIPLE
    parts = [left, right, left.new_zeros(shape)]
    shape[dim] += left.shape[dim] + right.shape[dim]
    return torch.cat(parts, dim, out=scratch(f"joined {slot}", tuple(shape), left.dtype, left.device))
