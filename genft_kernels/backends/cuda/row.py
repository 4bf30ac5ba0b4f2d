"""The row stage in its tiled form (`csrc/row.cu`)."""

from __future__ import annotations

from torch import Tensor

from ..launchers import Outcome, Update
from .launch import launch, update


def row_forward(y: Update, down: Tensor, outcome: Outcome) -> None:
    """Write h = phi(Y^T A^T + a)  [L, in, k]."""
    layers, k, _ = down.shape
    launch("row_forward", update(y, layers), down, k, outcome, down.dtype)


def row_backward(
    y: Update, down: Tensor, dz: Tensor, dleft: Tensor | None, dright: Tensor | None, ddown: Tensor | None
) -> None:
    """Write the gradients of left, right and down to `dleft`, `dright` and `ddown`, those that are not None."""
    layers, k, _ = down.shape
    given = update(y, layers), down, dz, k
    if dleft is not None or ddown is not None:
        launch("row_backward_out", *given, dleft, ddown, down.dtype)
    if dright is not None:
        launch("row_backward_in", *given, dright, down.dtype)
