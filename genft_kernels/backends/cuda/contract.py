"""The gradients of the update's factors, tiled form (`csrc/contract.cu`)."""

from __future__ import annotations

from torch import Tensor

from ..launchers import Pair, Update
from .fold import check_features
from .launch import launch, rows, update


def contract(dy: Tensor, x: Tensor, given: Update, scale: float, parts: Pair, tokens: int) -> None:
    """Write the parts of dh [split and out tile, in, k] and db [split and in tile, out, k], those that are not None."""
    check_features(dy.shape[1], x.shape[1])
    dtype = given.right.dtype
    launch("contract", (*rows(dy, dtype), *rows(x, dtype), dy.shape[0], tokens), update(given), scale, *parts, dtype)


def tile_of_contract(dy: Tensor, k: int, activation: str, dropout: float) -> tuple[int, int]:
    """Edges of a tile of G, along out and in."""
    return 64, 64
