"""Products of big matrices and thin ones, with the activation on the thin side (`csrc/thin.cu`)."""

from __future__ import annotations

from torch import Tensor

from ..launchers import Outcome
from .launch import launch, matrices


def thin_product(given: list[Tensor], thin: Tensor, outcome: Outcome, columns: int) -> None:
    """Write activation(matrix [m, n] thin[k, n]^T + bias), a part for each `columns` columns: [part x L, m, k]."""
    target = (outcome, None) if columns >= thin.shape[2] else ((None, None, "identity", None), outcome.out)
    launch("thin_product", matrices(given, thin.dtype), thin, thin.shape[1], *target, columns, thin.dtype)


def thin_transposed(dz: Tensor, given: list[Tensor], out: Tensor, rows: int) -> None:
    """Write dz [L, m, k]^T matrix [m, n], a part for each `rows` rows, to `out` [part x L, k, n]."""
    target = (out, None) if rows >= dz.shape[1] else (None, out)
    launch("thin_transposed", dz, matrices(given, dz.dtype), dz.shape[2], *target, rows, dz.dtype)
