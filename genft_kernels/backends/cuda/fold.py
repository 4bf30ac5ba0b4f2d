"""Fold the update into W (`csrc/fold.cu`)."""

from __future__ import annotations

from torch import Tensor

from ..launchers import Update
from .launch import launch, matrix, update

_EDGE = 64  # of a tile
_MOST_FEATURES = 65535 * _EDGE  # what CUDA's grids allow


def fold(weight: Tensor, given: Update, scale: float, out: Tensor) -> None:
    """Write W + scale * drop(psi(b h^T)) to `out` [out, in], which lies in memory as W does."""
    check_features(*weight.shape)
    dtype = given.right.dtype
    launch("fold", matrix(weight, dtype), update(given), scale, out, dtype)


def check_features(*features: int) -> None:
    """ValueError if there are more than a launch can have."""
    if max(features) > _MOST_FEATURES:
        raise ValueError(f"the CUDA kernels take at most {_MOST_FEATURES} features, got {max(features)}")
