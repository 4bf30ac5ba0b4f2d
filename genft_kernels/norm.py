"""The norm of W, of which `weight_ratio="rms"` makes the scale of an update."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_of(weight: Tensor) -> Tensor:
    """The Frobenius norm of a dense W, in float32 or wider."""
    wide, norms = torch.promote_types(weight.dtype, torch.float32), weight.detach()
    if norms.device.type == "cpu":  # which adds up all of a matrix one by one, and loses digits
        norms = torch.linalg.vector_norm(norms if norms.stride(-1) == 1 else norms.mT, dim=-1, dtype=wide)
    return torch.linalg.vector_norm(norms, dtype=wide)
