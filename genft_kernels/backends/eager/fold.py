"""W + scale * dW, the one transient of a whole weight's size, made for a matrix product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...scratch import scratch
from .products import is_16_bit
from .rounding import round_stochastically


class Folding(NamedTuple):
    """Where an update U goes: out = weight + scale * U, in 16 bits rounded so that no small U is swallowed."""

    weight: Tensor  # [out, in]
    scale: float
    out: Tensor  # contiguous

    @classmethod
    def of(cls, weight: Tensor, scale: float) -> Folding:
        """Into scratch memory."""
        return cls(weight, scale, scratch("folded", tuple(weight.shape), weight.dtype, weight.device))


def fold_rows(folding: Folding, rows: slice, update: Tensor, seed: Tensor | None) -> None:
    """Fold rows of an update by PyTorch's passes."""
    weight, out = folding.weight[rows], folding.out[rows]
    if is_16_bit(weight):
        exact = scratch("exact", tuple(weight.shape), torch.float32, weight.device).copy_(weight)
        round_stochastically(exact.add_(update, alpha=folding.scale), seed, out, rows.start * weight.shape[1])
    else:
        torch.add(weight, update, alpha=folding.scale, out=out)
