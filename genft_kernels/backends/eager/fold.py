"""W + scale * dW, the one transient of a whole weight's size, made tile by tile for a matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from .products import is_16_bit
from .rounding import round_stochastically
from .scratch import scratch
from .update_tile import Update


def fold(weight: Tensor, update: Update, scale: float) -> Tensor:
    """W + scale * U  [out, in] in scratch memory."""
    folded = scratch("folded", weight.shape, weight.dtype, weight.device)
    for rows, tile in update.tiles():
        fold_tile(weight[rows], tile.value_(), scale, update.seed, out=folded[rows])
    return folded


def fold_tile(weight: Tensor, update: Tensor, scale: float, seed: Tensor | None, out: Tensor) -> None:
    """out = weight + scale * update, rounded so that a 16-bit weight does not swallow a small update."""
    if is_16_bit(weight):
        exact = scratch("exact", weight.shape, torch.float32, weight.device).copy_(weight)
        round_stochastically(exact.add_(update, alpha=scale), seed, out=out)
    else:
        torch.add(weight, update, alpha=scale, out=out)
