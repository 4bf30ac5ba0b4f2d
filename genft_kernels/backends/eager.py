"""The operations in plain PyTorch: the planned algebra of design sections 2 to 5, on any device.

An update, or a gradient of its size, exists only as transient tiles of rows [tile, in] in the weight's
orientation; nothing of that size is returned or kept, but for the one folded weight that feeds a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activate, activation_backward
from ..philox import COLUMN_STREAM, keep_mask
from .stochastic_rounding import round_stochastically

# Elements of a tile: large enough that its products run at full speed, small enough to stay in cache.
_TILE_ELEMENTS = 1 << 20


def _row_tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cut `rows` into tiles of about `_TILE_ELEMENTS`; each starts at a multiple of 4, as masks ask."""
    height = max(64, _TILE_ELEMENTS // max(columns, 1) // 4 * 4)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


class _UpdateTile:
    """Rows of U = drop(psi(left right^T)): the tile itself, and the way of a gradient back through drop and psi."""

    def __init__(self, left: Tensor, right: Tensor, rows: slice, activation: str, dropout: float, seed, stream: int):
        self.activation = activation
        self.pre = left[rows] @ right.t()  # [tile, in]
        self.keep = None  # 0 or 1 / (1 - p), [tile, in]
        if dropout > 0:
            keep = keep_mask(seed, stream, right.shape[0], left.shape[0], dropout, rows)
            self.keep = keep.to(left.dtype).mul_(1 / (1 - dropout))

    def value(self) -> Tensor:
        value = activate(self.activation, self.pre)
        return value if self.keep is None else value * self.keep

    def backward(self, grad: Tensor) -> Tensor:
        grad = grad if self.keep is None else grad * self.keep
        return activation_backward(self.activation, grad, self.pre)


# --- column ---------------------------------------------------------------------------------------------------------


def column(weight: Tensor, down: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """h = phi(W A^T + a)  [out, k]."""
    return _activated(F.linear(weight.to(down.dtype), down, bias), activation)


def column_backward(grad: Tensor, weight: Tensor, pre: Tensor, activation: str, needs: list[bool]):
    """dA = dZ^T W  [k, in], da = sum of dZ  [k]."""
    need_down, need_bias = needs
    dz = activation_backward(activation, grad, pre)  # [out, k]
    down = (dz.t() @ weight.to(dz.dtype)) if need_down else grad.new_empty(0)
    return down, _column_sum(dz) if need_bias else grad.new_empty(0)


def _activated(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(activation of z, z where its gradient will want it)."""
    return activate(activation, z), z.new_empty(0) if activation == "identity" else z


def _column_sum(matrix: Tensor) -> Tensor:
    return matrix.sum(0, dtype=_wide(matrix.dtype)).to(matrix.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- row ------------------------------------------------------------------------------------------------------------


def row(left, right, down, bias, seed, outer: str, dropout: float, inner: str) -> tuple[Tensor, Tensor]:
    """h = phi(Y^T A^T + a)  [in, k], Y = drop(psi(left right^T))  [out, in]."""
    if outer == "identity" and dropout == 0:
        z = F.linear(right, down @ left, bias)  # the stages meet in a core [k, k1]
        return _activated(z, inner)
    z = torch.zeros((right.shape[0], down.shape[0]), dtype=_wide(down.dtype), device=down.device)
    for rows in _row_tiles(left.shape[0], right.shape[0]):
        y = _UpdateTile(left, right, rows, outer, dropout, seed, COLUMN_STREAM).value()
        z += (down[:, rows] @ y).t()
    z = z if bias is None else z + bias
    return _activated(z.to(down.dtype), inner)


def row_backward(grad, left, right, down, pre, seed, outer: str, dropout: float, inner: str, needs: list[bool]):
    """(dleft [out, k1], dright [in, k1], dA [k, out], da [k]); a tile of dY = (dZ A)^T is formed and used up."""
    need_left, need_right, need_down, need_bias = needs
    nothing = grad.new_empty(0)
    dz = activation_backward(inner, grad, pre)  # [in, k]
    bias = _column_sum(dz) if need_bias else nothing
    if outer == "identity" and dropout == 0:
        core_grad = dz.t() @ right  # [k, k1]
        return (
            down.t() @ core_grad if need_left else nothing,
            dz @ (down @ left) if need_right else nothing,
            core_grad @ left.t() if need_down else nothing,
            bias,
        )
    dleft = torch.empty_like(left) if need_left else nothing
    dright = torch.zeros_like(right, dtype=_wide(right.dtype)) if need_right else nothing
    ddown = torch.empty_like(down) if need_down else nothing
    for rows in _row_tiles(left.shape[0], right.shape[0]):
        tile = _UpdateTile(left, right, rows, outer, dropout, seed, COLUMN_STREAM)
        if need_down:
            ddown[:, rows] = (tile.value() @ dz).t()
        if need_left or need_right:
            q = tile.backward(down[:, rows].t() @ dz.t())  # d(left right^T) [tile, in]
            if need_left:
                torch.mm(q, right, out=dleft[rows])
            if need_right:
                dright += (left[rows].t() @ q).t()
    return dleft, dright.to(grad.dtype), ddown, bias


# --- linear ---------------------------------------------------------------------------------------------------------


def linear(x, weight, bias, h, b, seed, scale: float, activation: str, dropout: float, stream: int):
    """y = x (W + scale * drop(psi(b h^T)))^T + bias, and x h in the factored form."""
    tokens, weight = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)  # [T, in], [out, in]
    if activation == "identity" and dropout == 0:
        y, xh = _factored_forward(tokens, weight, bias, h, b, scale)
    else:
        folded = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for rows in _row_tiles(*weight.shape):
            update = _UpdateTile(b, h, rows, activation, dropout, seed, stream).value()
            _fold(weight[rows], update, scale, seed, out=folded[rows])
        y, xh = F.linear(tokens, folded, bias), x.new_empty(0)
    return y.reshape(*x.shape[:-1], weight.shape[0]), xh


def linear_backward(grad, x, weight, h, b, xh, seed, scale, activation, dropout, stream, needs):
    """(dx, dbias, dh, db). Tiled: a tile of G = dy^T x is formed, contracted with the factors, and dropped."""
    need_x, need_bias, need_h, need_b = needs
    nothing, dy = grad.new_empty(0), grad.reshape(-1, grad.shape[-1])  # [T, out]
    weight = weight.to(grad.dtype) if need_x else None
    tokens = None if x is None else x.reshape(-1, x.shape[-1])  # [T, in]
    bias = _column_sum(dy) if need_bias else nothing
    if activation == "identity" and dropout == 0:
        dx, dh, db = _factored_backward(dy, tokens, weight, h, b, xh, scale, need_x, need_h, need_b)
    elif need_x or need_h or need_b:
        folded = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_x else None
        dh = torch.zeros_like(h, dtype=_wide(h.dtype)) if need_h else nothing
        db = torch.empty_like(b) if need_b else nothing
        for rows in _row_tiles(b.shape[0], h.shape[0]):
            tile = _UpdateTile(b, h, rows, activation, dropout, seed, stream)
            if need_x:
                _fold(weight[rows], tile.value(), scale, seed, out=folded[rows])
            if need_h or need_b:
                p = tile.backward(dy[:, rows].t() @ tokens)  # d(b h^T) / scale, [tile, in]
                if need_b:
                    torch.mm(p, h, out=db[rows])
                if need_h:
                    dh += (b[rows].t() @ p).t()
        dx = dy @ folded if need_x else nothing
        dh, db = dh.mul_(scale).to(grad.dtype), db.mul_(scale)
    else:
        dx = dh = db = nothing
    return dx.reshape(*grad.shape[:-1], dx.shape[-1]) if need_x else nothing, bias, dh, db


def _fold(weight: Tensor, update: Tensor, scale: float, seed: Tensor | None, out: Tensor) -> None:
    """out = weight + scale * update, rounded so that a 16-bit weight does not swallow a small update."""
    if weight.dtype.itemsize > 2:
        torch.add(weight, update, alpha=scale, out=out)
    else:
        round_stochastically(weight.float().add_(update, alpha=scale), seed, out=out)


def _factored_forward(tokens, weight, bias, h, b, scale) -> tuple[Tensor, Tensor]:
    xh = tokens @ h  # [T, k]
    if weight.dtype.itemsize > 2:
        return F.linear(tokens, weight, bias).addmm_(xh, b.t(), alpha=scale), xh
    # Extended K: both products share one float32 accumulator. Added to a y rounded to 16 bits, the update would be
    # lost (design section 5).
    return F.linear(torch.cat([tokens, xh], 1), torch.cat([weight, b * scale], 1), bias), xh


def _factored_backward(dy, tokens, weight, h, b, xh, scale, need_x, need_h, need_b) -> tuple[Tensor, Tensor, Tensor]:
    dx = dh = db = dy.new_empty(0)
    if need_b:
        db = (xh.t() @ dy).t() * scale  # [out, k]
    if need_x or need_h:
        dyb = dy @ b  # [T, k]
    if need_h:
        dh = (dyb.t() @ tokens).t() * scale  # [in, k]
    if need_x and weight.dtype.itemsize > 2:
        dx = (dy @ weight).addmm_(dyb, h.t(), alpha=scale)
    elif need_x:
        dx = torch.cat([dy, dyb], 1) @ torch.cat([weight, h.t() * scale], 0)
    return dx, dh, db
