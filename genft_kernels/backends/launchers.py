"""The launchers that a backend of kernels has: functions that only write into the tensors that they are given.

Thin matrices come contiguous, big ones of any strides and perhaps of another dtype. The parts of a long sum are
float32, stacked along the first dimension. What is None is not written.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from .eager.update_tile import Update

__all__ = ["Launchers", "Outcome", "Pair", "Sum", "Update"]


class Outcome(NamedTuple):
    """Where activation(z + bias [k]) goes, z [..., k], and, but for the identity, what the activation is applied to."""

    out: Tensor
    bias: Tensor | None = None
    activation: str = "identity"
    pre: Tensor | None = None


class Sum(NamedTuple):
    """float32 parts [parts, ...] of a sum, and where the sum goes."""

    parts: Tensor
    outcome: Outcome


Pair = tuple[Tensor | None, Tensor | None]


class Launchers(Protocol):
    """A module with these functions."""

    def thin_product(self, matrices: list[Tensor], thin: Tensor, outcome: Outcome, columns: int) -> None:
        """matrix [m, n] thin[k, n]^T, a part for each `columns` of the n: [part x L, m, k]."""

    def thin_transposed(self, dz: Tensor, matrices: list[Tensor], out: Tensor, rows: int) -> None:
        """dz [L, m, k]^T matrix [m, n], a part for each `rows` of the m: [part x L, k, n]."""

    def row_forward(self, y: Update, down: Tensor, outcome: Outcome) -> None:
        """h = phi(Y^T A^T + a)  [L, in, k]."""

    def row_backward(
        self, y: Update, down: Tensor, dz: Tensor, dleft: Tensor | None, dright: Tensor | None, ddown: Tensor | None
    ) -> None:
        """The gradients of Y's factors and of A."""

    def fold(self, weight: Tensor, update: Update, scale: float, out: Tensor) -> None:
        """W + scale * U  [out, in]; `out` lies in memory as W does."""

    def contract(self, dy: Tensor, x: Tensor, update: Update, scale: float, parts: Pair, tokens: int) -> None:
        """The parts of dh [part, in, k] and of db [part, out, k], one for each tile of G and each `tokens` tokens."""

    def tile_of_contract(self, dy: Tensor, k: int, activation: str, dropout: float) -> tuple[int, int]:
        """Edges of a tile of G, along out and in."""

    def sum_parts(self, first: Sum, second: Sum | None = None) -> None:
        """Sums in a fixed order, in one launch; the second one's outcome has no bias and no activation."""
