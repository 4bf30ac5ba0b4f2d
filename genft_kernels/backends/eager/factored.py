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

# Tokens, as in decoding, for which it is the beginning of a thin product of 16 bits that counts.
_FEW = 4


def factored(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y [T, out], scale * x h [T, k]): scaled there, nothing else need be, here or in backward."""
    if not is_16_bit(tokens):
        xh = scaled_product(tokens, h, scale)
        return F.linear(tokens, weight, bias).addmm_(xh, b.t()), xh
    if not _extends(tokens):
        return _with_the_small_product_first(tokens, weight, bias, h, b, scale)
    xh = scaled_product(tokens, h, scale)
    return F.linear(torch.cat([tokens, xh], 1), torch.cat([weight, b], 1), bias), xh


def _with_the_small_product_first(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `factored`, y = sigma x h b^T first and x W^T added onto it."""
    if tokens.shape[0] > _FEW:
        xh = scaled_product(tokens, h, scale)
        y = xh @ b.t()
    else:  # a thin product begins in a third of the time in float32, with the casts
        wide_xh = scaled_product(tokens.float(), h.float(), scale)
        xh, y = wide_xh.to(tokens.dtype), (wide_xh @ b.float().t()).to(tokens.dtype)
    # Read for a vector, W takes three quarters of the time in bfloat16, but twice the time in float16. Where it lies
    # in columns, and there is no oneDNN, the sum of such a product would be rounded term by term.
    if tokens.shape[0] == 1 and tokens.dtype == torch.bfloat16 and weight.is_contiguous():
        y[0].addmv_(weight, tokens[0])
    else:
        y.addmm_(tokens, weight.t())
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
    """(dx [T, in], or None without `weight`; dh [in, k] and db [out, k], those that `needs` names).

    `xh` is what `factored` gave.
    """
    (h, b), (need_h, need_b) = factors, needs
    dyb = scaled_product(dy, b, scale) if need_h or weight is not None else None  # [T, k]
    dx = dh = db = None
    if need_h and tokens is not None and dyb is not None:
        dh = sum_over_tokens(tokens, dyb)
    if need_b and xh is not None:
        db = sum_over_tokens(dy, xh)
    if weight is not None and dyb is not None:
        if _extends(dy):
            dx = torch.cat([dy, dyb], 1) @ torch.cat([weight, h.t()], 0)
        else:
            dx = (dyb @ h.t()).addmm_(dy, weight)
    return dx, dh, db


def _extends(tensor: Tensor) -> bool:
    """Whether both products must be one: in 16 bits, but for a CPU."""
    return is_16_bit(tensor) and tensor.device.type != "cpu"
