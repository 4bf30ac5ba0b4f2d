"""The backward of the tiled form: a tile of G = dy^T x is formed, contracted with the factors, and dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from .fold import Folding
from .products import add_part, product
from .update_tile import Update


def contract_and_fold(
    dy: Tensor, tokens: Tensor | None, weight: Tensor | None, update: Update, scale: float, need_h: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [T, in], dh [in, k], db [out, k]) of the update drop(psi(b h^T)).

    `weight`, which is folded again, is there where dx is wanted; `tokens` where dh or db is.
    """
    b, h = update.left, update.right
    folding = None if weight is None else Folding.of(weight, scale)
    dh = None  # [k, in]
    db = torch.empty_like(b) if need_b else None
    for tile in update.tiles():
        rows, grad = tile.rows, None
        if (need_h or need_b) and tokens is not None:
            grad = product("grad", dy[:, rows].t(), tokens)  # G  [tile, in]
        tile.evaluate_(grad, folding=folding)
        if grad is not None and db is not None:
            torch.mm(grad, h, out=db[rows])  # of what is now d(b h^T) / scale
        if grad is not None and need_h:
            dh = add_part(dh, b[rows].t() @ grad)
    return (
        None if folding is None else dy @ folding.out,
        None if dh is None else dh.t().mul(scale).to(h.dtype).contiguous(),
        None if db is None else db.mul_(scale),
    )
