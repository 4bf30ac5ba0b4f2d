"""The token side of the factored form: a big product and two thin ones (docs/method.md#factored-form).

Added to a y that is rounded to 16 bits, half of a small update is lost (docs/method.md#precision). There the small
product goes first on a CPU, and the big one is added onto it in float32. cuBLAS rounds the big one before it adds: on a
GPU both are one product with a longer inner dimension. On a CPU that is no quicker: copies of x and W take as long as a
second pass over y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import is_16_bit, scaled_product, sum_over_tokens


def factored(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y [T, out], x h [T, k])."""
    xh = tokens @ h
    if not is_16_bit(tokens):
        return F.linear(tokens, weight, bias).addmm_(xh, b.t(), alpha=scale), xh
    if _extends(tokens):
        return F.linear(torch.cat([tokens, xh], 1), torch.cat([weight, b * scale], 1), bias), xh
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
        if _extends(dy):
            dx = torch.cat([dy, dyb], 1) @ torch.cat([weight, h.t() * scale], 0)
        else:
            dx = scaled_product(dyb, h.t(), scale).addmm_(dy, weight)
    return dx, dh, db


def _extends(tensor: Tensor) -> bool:
    """Whether both products must be one: in 16 bits, but for a CPU."""
    return is_16_bit(tensor) and tensor.device.type != "cpu"
