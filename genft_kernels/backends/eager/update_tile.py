"""Tiles of an update U = drop(psi(left right^T)): the product, then all that is elementwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import philox
from ...activations import activate_, activation_backward_
from . import cpu_pass
from .fold import Folding, fold_rows
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

    def tiles(self) -> Iterator[UpdateTile]:
        """The tiles of whole rows one by one; each starts at a multiple of 4, as masks ask."""
        rows, columns = self.left.shape[0], self.right.shape[0]
        elements = _TILE_ELEMENTS if self.left.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
        height = max(64, elements // columns // 4 * 4)
        for start in range(0, rows, height):
            tile = slice(start, min(start + height, rows))
            yield UpdateTile(self, tile, product("pre", self.left[tile], self.right.t()))


class UpdateTile(NamedTuple):
    """Some rows of left right^T in scratch memory, which the next tile overwrites."""

    update: Update
    rows: slice
    pre: Tensor  # left right^T  [tile, columns]

    def evaluate_(self, grad: Tensor | None = None, value: bool = False, folding: Folding | None = None) -> Tensor:
        """Everything elementwise that is wanted of the tile, by compiled code in one pass where there is any.

        Args:
            grad: the gradient of U  [tile, columns], which that of left right^T takes the place of.
            value: whether U itself is wanted.
            folding: the weight that the rows of U are added to.

        Returns:
            U, in the place of left right^T; without `value` it is not to be read.
        """
        if not cpu_pass.run(self, grad, value, folding):
            self._plain(grad, value, folding)
        return self.pre

    def _plain(self, grad: Tensor | None, value: bool, folding: Folding | None) -> None:
        keep = self._keep_factors()
        if grad is not None:
            activation_backward_(self.update.activation, grad if keep is None else grad.mul_(keep), self.pre)
        if value or folding is not None:
            update = activate_(self.update.activation, self.pre)
            update = update if keep is None else update.mul_(keep)
        if folding is not None:
            fold_rows(folding, self.rows, update, self.update.seed)

    def _keep_factors(self) -> Tensor | None:
        """0 or 1 / (1 - p) for each element; None without dropout."""
        update, dtype = self.update, self.pre.dtype
        if update.dropout == 0:
            return None
        assert update.seed is not None
        size = update.right.shape[0], update.left.shape[0]
        keep = philox.keep_mask(update.seed, update.stream, *size, update.dropout, self.rows)
        return keep.to(dtype).mul_(torch.tensor(1 / (1 - update.dropout), dtype=dtype))
