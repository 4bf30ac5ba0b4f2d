"""Tiles of an update U = drop(psi(left right^T)), or of a gradient of its size, in scratch memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ...activations import activate_, activation_backward_
from .dropout import dropout_factors
from .products import product

# Elements of a tile: large enough that its products run at full speed, small enough to stay in a CPU's cache;
# elsewhere large enough that a pass over it takes longer than its launch.
_TILE_ELEMENTS = 1 << 20
_DEVICE_TILE_ELEMENTS = 1 << 22


class Update(NamedTuple):
    """U = drop(psi(left right^T))  [rows, columns], of left [rows, k] and right [columns, k]."""

    left: Tensor
    right: Tensor
    activation: str
    dropout: float
    seed: Tensor | None
    stream: int

    def tiles(self) -> Iterator[tuple[slice, UpdateTile]]:
        """The tiles of whole rows one by one; each starts at a multiple of 4, as masks ask."""
        rows, columns = self.left.shape[0], self.right.shape[0]
        elements = _TILE_ELEMENTS if self.left.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
        height = max(64, elements // columns // 4 * 4)
        for start in range(0, rows, height):
            tile = slice(start, min(start + height, rows))
            yield tile, UpdateTile(self, tile)


class UpdateTile:
    """Rows of an update, made and taken back in scratch memory, which the next tile overwrites.

    First `backward_` where a gradient has to pass, then `value_`: it overwrites what the gradient needs.
    """

    def __init__(self, update: Update, rows: slice):
        left, right, self._activation, dropout, seed, stream = update
        self._pre = product("pre", left[rows], right.t())  # [tile, columns]
        self._keep = None  # 0 or 1 / (1 - p), [tile, columns]
        if dropout > 0:
            self._keep = dropout_factors(seed, stream, right.shape[0], left.shape[0], dropout, rows, left.dtype)

    def backward_(self, grad: Tensor) -> Tensor:
        """grad of U -> grad of left right^T, in place."""
        grad = grad if self._keep is None else grad.mul_(self._keep)
        return activation_backward_(self._activation, grad, self._pre)

    def value_(self) -> Tensor:
        """U itself, in the place of left right^T."""
        value = activate_(self._activation, self._pre)
        return value if self._keep is None else value.mul_(self._keep)
