"""The launches of the kernels of `csrc/`, under the names of `genft_kernels/backends/launchers.py`."""

from __future__ import annotations

from torch import Tensor

from ..launchers import Outcome, Pair, Sum, Update
from .launch import launch, matrices, matrix, rows, update

_EDGE = 64  # of a tile
_MOST_FEATURES = 65535 * _EDGE  # that CUDA's grids allow
_NO_OUTCOME = None, None, "identity", None


def thin_product(given: list[Tensor], thin: Tensor, outcome: Outcome, columns: int) -> None:
    """Write activation(matrix [m, n] thin[k, n]^T + bias), a part for each `columns` columns: [part x L, m, k]."""
    target = (outcome, None) if columns >= thin.shape[2] else (_NO_OUTCOME, outcome.out)
    launch("thin_product", matrices(given, thin.dtype), thin, thin.shape[1], *target, columns, thin.dtype)


def thin_transposed(dz: Tensor, given: list[Tensor], out: Tensor, rows: int) -> None:
    """Write dz [L, m, k]^T matrix [m, n], a part for each `rows` rows, to `out` [part x L, k, n]."""
    target = (out, None) if rows >= dz.shape[1] else (None, out)
    launch("thin_transposed", dz, matrices(given, dz.dtype), dz.shape[2], *target, rows, dz.dtype)


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


def fold(weight: Tensor, given: Update, scale: float, out: Tensor) -> None:
    """Write W + scale * drop(psi(b h^T)) to `out` [out, in], which lies in memory as W does."""
    _check_features(*weight.shape)
    dtype = given.right.dtype
    launch("fold", matrix(weight, dtype), update(given), scale, out, dtype)


def contract(dy: Tensor, x: Tensor, given: Update, scale: float, parts: Pair, tokens: int) -> None:
    """Write the parts of dh [split and out tile, in, k] and db [split and in tile, out, k], those that are not None."""
    _check_features(dy.shape[1], x.shape[1])
    dtype = given.right.dtype
    launch("contract", (*rows(dy, dtype), *rows(x, dtype), dy.shape[0], tokens), update(given), scale, *parts, dtype)


def tile_of_contract(dy: Tensor, k: int, activation: str, dropout: float) -> tuple[int, int]:
    """Edges of a tile of G, along out and in."""
    return _EDGE, _EDGE


def sum_parts(first: Sum, second: Sum | None = None) -> None:
    """Write sums of parts, both in one launch."""
    out = first.outcome.out
    other = (None, 0, 0, _NO_OUTCOME) if second is None else _sum(second)
    launch("sum_parts", _sum(first), other, out.shape[-1], out.dtype)


def _sum(given: Sum) -> tuple[object, ...]:
    return given.parts, given.parts.shape[0], given.outcome.out.numel(), given.outcome


def _check_features(*features: int) -> None:
    """ValueError if there are more than a launch can have."""
    if max(features) > _MOST_FEATURES:
        raise ValueError(f"the CUDA kernels take at most {_MOST_FEATURES} features, got {max(features)}")
