"""The operations in plain PyTorch: the planned algebra of docs/method.md#two-products, on any device.

An update, or a gradient of its size, exists only as transient tiles of rows [tile, in] in the weight's
orientation; nothing of that size is returned or kept. The one transient of a whole weight's size is the folded
W + scale * dW that feeds a matrix product. A result that is not wanted is None.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import activate, activate_, activation_backward, activation_backward_
from ...config import is_factored
from ...philox import COLUMN_STREAM
from .dropout import dropout_factors
from .rounding import round_stochastically
from .scratch import scratch

# Elements of a tile: large enough that its products run at full speed, small enough to stay in a CPU's cache;
# elsewhere large enough that a pass over it takes longer than its launch.
_TILE_ELEMENTS = 1 << 20
_DEVICE_TILE_ELEMENTS = 1 << 22


class _UpdateTile:
    """Rows of U = drop(psi(left right^T)), made and taken back in scratch memory.

    First `backward_` where a gradient has to pass, then `value_`: it overwrites what the gradient needs.
    """

    def __init__(self, left: Tensor, right: Tensor, rows: slice, activation: str, dropout: float, seed, stream: int):
        self.activation = activation
        out_features, left = left.shape[0], left[rows]
        self.pre = _product("pre", left, right.t())  # [tile, in]
        self.keep = None  # 0 or 1 / (1 - p), [tile, in]
        if dropout > 0:
            self.keep = dropout_factors(seed, stream, right.shape[0], out_features, dropout, rows, left.dtype)

    def backward_(self, grad: Tensor) -> Tensor:
        """grad of U -> grad of left right^T, in place."""
        grad = grad if self.keep is None else grad.mul_(self.keep)
        return activation_backward_(self.activation, grad, self.pre)

    def value_(self) -> Tensor:
        """U itself, in the place of left right^T."""
        value = activate_(self.activation, self.pre)
        return value if self.keep is None else value.mul_(self.keep)


def _row_tiles(left: Tensor, right: Tensor) -> Iterator[slice]:
    """Slices that cut the rows of left right^T into tiles; each starts at a multiple of 4, as masks ask."""
    rows, columns = left.shape[0], right.shape[0]
    elements = _TILE_ELEMENTS if left.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
    height = max(64, elements // columns // 4 * 4)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _product(slot: str, left: Tensor, right: Tensor) -> Tensor:
    """left @ right in scratch memory."""
    return torch.mm(left, right, out=scratch(slot, (left.shape[0], right.shape[1]), left.dtype, left.device))


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _long_sums(left: Tensor, right: Tensor) -> Tensor:
    """left [L, k, n] @ right [L, n, k]. For one layer as no batch: cuBLAS splits long sums of single products only."""
    return torch.mm(left[0], right[0])[None] if left.shape[0] == 1 else left.bmm(right)


def _is_16_bit(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize == 2


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over tiles and over tokens are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part, at least in float32 from the second part on."""
    return part if total is None else total.to(_wide(part.dtype)).add_(part)


def _sum_of_rows(matrix: Tensor) -> Tensor:
    return matrix.sum(0, dtype=_wide(matrix.dtype)).to(matrix.dtype)


def _activated(z: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """(activation of z, z where its gradient will want it)."""
    return activate(activation, z), None if activation == "identity" else z


# --- column ---------------------------------------------------------------------------------------------------------


def column(weights: list[Tensor], down: Tensor, bias: Tensor | None, activation: str):
    """h = phi(W A^T + a)  [L, out, k], for L layers."""
    z = down.new_empty((len(weights), weights[0].shape[0], down.shape[1]))
    for weight, a, out in zip(weights, down, z, strict=True):
        if bias is None:
            torch.mm(weight.to(a.dtype), a.t(), out=out)
        else:
            torch.addmm(bias, weight.to(a.dtype), a.t(), out=out)
    return _activated(z, activation)


def column_backward(grad: Tensor, weights: list[Tensor], pre: Tensor, activation: str, needs: list[bool]):
    """dA = dZ^T W  [L, k, in], da = sum of dZ  [k]."""
    need_down, need_bias = needs
    dz = activation_backward(activation, grad, pre)  # [L, out, k]
    ddown = None
    if need_down:
        ddown = dz.new_empty((len(weights), dz.shape[2], weights[0].shape[1]))
        for weight, layer_dz, out in zip(weights, dz, ddown, strict=True):
            torch.mm(layer_dz.t(), weight.to(dz.dtype), out=out)
    return ddown, _sum_of_rows(dz.flatten(0, 1)) if need_bias else None


# --- row ------------------------------------------------------------------------------------------------------------


def row(left, right, down, bias, seed, outer: str, dropout: float, inner: str):
    """h = phi(Y^T A^T + a)  [L, in, k], Y = drop(psi(left right^T))  [out, in], for L layers."""
    if is_factored(outer, dropout):
        z = right.bmm(_long_sums(down, left).mT)  # the stages meet in a core [k, k1]
    else:
        seeds = _seeds(seed, left)
        z = torch.stack([_tiled_row(*layer, outer, dropout) for layer in zip(left, right, down, seeds, strict=True)])
    z = z if bias is None else z + bias
    return _activated(z.to(down.dtype), inner)


def row_backward(grad, left, right, down, pre, seed, outer: str, dropout: float, inner: str, needs: list[bool]):
    """(dleft [L, out, k1], dright [L, in, k1], dA [L, k, out], da [k])."""
    *need_matrices, need_bias = needs
    dz = activation_backward(inner, grad, pre)  # [L, in, k]
    dbias = _sum_of_rows(dz.flatten(0, 1)) if need_bias else None
    if is_factored(outer, dropout):
        return *_factored_row_backward(dz, left, right, down, *need_matrices), dbias
    layers = zip(dz, left, right, down, _seeds(seed, left), strict=True)
    grads = zip(*(_tiled_row_backward(*layer, outer, dropout, *need_matrices) for layer in layers), strict=True)
    return *(None if parts[0] is None else torch.stack(parts) for parts in grads), dbias


def _seeds(seed: Tensor | None, layers: Tensor):
    """Each layer's own, [1]."""
    return [None] * layers.shape[0] if seed is None else seed.split(1)


def _factored_row_backward(dz, left, right, down, need_left, need_right, need_down):
    core_grad = _long_sums(dz.mT, right) if need_left or need_down else None  # [L, k, k1]
    return (
        down.mT.bmm(core_grad) if need_left else None,
        dz.bmm(_long_sums(down, left)) if need_right else None,
        core_grad.bmm(left.mT) if need_down else None,
    )


def _tiled_row(left, right, down, seed, outer, dropout):
    """Y^T A^T  [in, k] of one layer, at least in float32 if Y takes more than one tile."""
    z = None  # [k, in]
    for rows in _row_tiles(left, right):
        y = _UpdateTile(left, right, rows, outer, dropout, seed, COLUMN_STREAM).value_()
        z = _sum(z, down[:, rows] @ y)
    return z.t()


def _tiled_row_backward(dz, left, right, down, seed, outer, dropout, need_left, need_right, need_down):
    """One layer, as in flash attention: a tile of Y is made again, and dY = (dZ A)^T is formed for it and used up."""
    dleft = torch.empty_like(left) if need_left else None
    dright = None  # [k1, in]
    ddown = torch.empty_like(down) if need_down else None
    for rows in _row_tiles(left, right):
        tile = _UpdateTile(left, right, rows, outer, dropout, seed, COLUMN_STREAM)
        if need_left or need_right:
            q = tile.backward_(_product("grad", down[:, rows].t(), dz.t()))  # d(left right^T)  [tile, in]
        if need_left:
            torch.mm(q, right, out=dleft[rows])
        if need_right:
            dright = _sum(dright, left[rows].t() @ q)
        if need_down:
            ddown[:, rows] = (tile.value_() @ dz).t()
    return dleft, dright.t().to(right.dtype).contiguous() if need_right else None, ddown


# --- linear ---------------------------------------------------------------------------------------------------------


def linear(x, weight, bias, h, b, seed, scale: float, activation: str, dropout: float, stream: int):
    """(y = x (W + scale * drop(psi(b h^T)))^T + bias  [..., out], x h  [tokens, k] in the factored form)."""
    tokens, weight = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)  # [T, in], [out, in]
    if is_factored(activation, dropout):
        y, xh = _factored_forward(tokens, weight, bias, h, b, scale)
    else:
        folded = scratch("folded", weight.shape, weight.dtype, weight.device)
        for rows in _row_tiles(b, h):
            update = _UpdateTile(b, h, rows, activation, dropout, seed, stream).value_()
            _fold(weight[rows], update, scale, seed, out=folded[rows])
        y, xh = F.linear(tokens, folded, bias), None
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
        settings = seed, scale, activation, dropout, stream
        dx, dh, db = _tiled_backward(dy, tokens, weight, h, b, *settings, need_x, need_h, need_b)
    dx = dx.reshape(*grad.shape[:-1], dx.shape[-1]) if need_x else None
    return dx, _sum_of_rows(dy) if need_bias else None, dh, db


# Added to a y that is rounded to 16 bits, half of a small update is lost (docs/method.md#precision). On a CPU the small
# product goes first, and the big one is added onto it in float32. cuBLAS rounds the big one before it adds: on a GPU
# both are one product with a longer inner dimension.


def _extends(tensor: Tensor) -> bool:
    """Whether both products must be one: in 16 bits, but for a CPU."""
    return _is_16_bit(tensor) and tensor.device.type != "cpu"


def _factored_forward(tokens, weight, bias, h, b, scale):
    xh = tokens @ h  # [T, k]
    if _extends(tokens):
        return F.linear(torch.cat([tokens, xh], 1), torch.cat([weight, b * scale], 1), bias), xh
    if bias is None or _is_16_bit(weight):
        y = _scaled_product(xh, b.t(), scale)
    else:
        y = torch.addmm(bias, xh, b.t(), alpha=scale)
    y.addmm_(tokens, weight.t())
    # In 16 bits a bias would swallow the small product; what is rounded a second time has the update in it.
    return (y.add_(bias) if bias is not None and _is_16_bit(weight) else y), xh


def _factored_backward(dy, tokens, weight, h, b, xh, scale, need_x, need_h, need_b):
    dx = dyb = None
    if need_x or need_h:
        dyb = dy @ b  # [T, k]
    dh = _scaled_product(tokens.t(), dyb, scale) if need_h else None
    db = _scaled_product(dy.t(), xh, scale) if need_b else None
    if need_x and _extends(dy):
        dx = torch.cat([dy, dyb], 1) @ torch.cat([weight, h.t() * scale], 0)
    elif need_x:
        dx = _scaled_product(dyb, h.t(), scale).addmm_(dy, weight)
    return dx, dh, db


def _tiled_backward(dy, tokens, weight, h, b, seed, scale, activation, dropout, stream, need_x, need_h, need_b):
    """A tile of G = dy^T x is formed, contracted with the factors, and dropped; W is folded again for dx."""
    folded = scratch("folded", weight.shape, weight.dtype, weight.device) if need_x else None
    dh = None  # [k, in]
    db = torch.empty_like(b) if need_b else None
    for rows in _row_tiles(b, h):
        tile = _UpdateTile(b, h, rows, activation, dropout, seed, stream)
        if need_h or need_b:
            p = tile.backward_(_product("grad", dy[:, rows].t(), tokens))  # d(b h^T) / scale  [tile, in]
        if need_b:
            torch.mm(p, h, out=db[rows])
        if need_h:
            dh = _sum(dh, b[rows].t() @ p)
        if need_x:
            _fold(weight[rows], tile.value_(), scale, seed, out=folded[rows])
    return (
        dy @ folded if need_x else None,
        dh.t().mul(scale).to(h.dtype).contiguous() if need_h else None,
        db.mul_(scale) if need_b else None,
    )


def _fold(weight: Tensor, update: Tensor, scale: float, seed: Tensor | None, out: Tensor) -> None:
    """out = weight + scale * update, rounded so that a 16-bit weight does not swallow a small update."""
    if _is_16_bit(weight):
        exact = scratch("exact", weight.shape, torch.float32, weight.device).copy_(weight)
        round_stochastically(exact.add_(update, alpha=scale), seed, out=out)
    else:
        torch.add(weight, update, alpha=scale, out=out)
