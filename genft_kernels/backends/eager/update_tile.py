"""An update as its thin factors, and what may be wanted of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .products import product

# Elements of a tile: large enough that its products run at full speed, small enough to stay in a CPU's cache;
# elsewhere large enough that a pass over it takes longer than its launch.
_TILE_ELEMENTS = 1 << 20
_DEVICE_TILE_ELEMENTS = 1 << 22


class Update(NamedTuple):
    """U = drop(psi(left right^T))  [rows, columns]."""

    left: Tensor  # [rows, k]
    right: Tensor  # [columns, k]
    activation: str
    dropout: float
    seed: Tensor | None
    stream: int

    def tiles(self) -> Iterator[slice]:
        """The rows of each tile; they start at a multiple of 4, as masks ask."""
        rows, columns = self.left.shape[0], self.right.shape[0]
        elements = _TILE_ELEMENTS if self.left.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
        height = max(64, elements // max(columns, 1) // 4 * 4)
        return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


class Others(NamedTuple):
    """Two more matrices beside U: its gradient is their product left right^T, and U may be multiplied with each."""

    left: Tensor | None = None  # [rows, m]
    right: Tensor | None = None  # [columns, m]

    def product(self, slot: str, rows: slice) -> Tensor:
        """Rows of it, in scratch memory."""
        assert self.left is not None and self.right is not None
        return product(slot, self.left[rows], self.right.t())


class Wanted(NamedTuple):
    """Which of `Sums`."""

    left: bool = False
    right: bool = False
    others_left: bool = False
    others_right: bool = False

    @property
    def gradient(self) -> bool:
        """Whether that of left right^T is formed."""
        return self.left or self.right


class Sums(NamedTuple):
    """The gradients of the thin matrices, P that of left right^T; at least in float32 where they are long sums."""

    left: Tensor | None  # P right  [rows, k]
    right: Tensor | None  # P^T left  [columns, k]
    others_left: Tensor | None  # U others.right  [rows, m]
    others_right: Tensor | None  # U^T others.left  [columns, m]
