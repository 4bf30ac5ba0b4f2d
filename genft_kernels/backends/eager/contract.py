"""The backward of the tiled form: a tile of G = dy^T x is formed, contracted with the factors, and dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from .fold import fold_tile
from .products import add_part, product
from .scratch import scratch
from .update_tile import Update


def contract_and_fold(
    dy: Tensor, tokens: Tensor | None, weight: Tensor | None, update: Update, scale: float, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [T, in], dh [in, k], db [out, k]) of the update drop(psi(b h^T)); W is folded again for dx."""
    need_x, need_h, need_b = needs
    b, h = update.left, update.right
    folded = scratch("folded", weight.shape, weight.dtype, weight.device) if need_x else None
    dh = None  # [k, in]
    db = torch.empty_like(b) if need_b else None
    for rows, tile in update.tiles():
        if need_h or need_b:
            p = tile.backward_(product("grad", dy[:, rows].t(), tokens))  # d(b h^T) / scale  [tile, in]
        if need_b:
            torch.mm(p, h, out=db[rows])
        if need_h:
            dh = add_part(dh, b[rows].t() @ p)
        if need_x:
            fold_tile(weight[rows], tile.value_(), scale, update.seed, out=folded[rows])
    return (
        dy @ folded if need_x else None,
        dh.t().mul(scale).to(h.dtype).contiguous() if need_h else None,
        db.mul_(scale) if need_b else None,
    )
