"""The short road of evaluation: a forward that asks what the last one has asked is not checked and settled again.

All that is looked at each time is whether the factors hold (genft_kernels/sharing/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _torch_private, backends
from .config import is_factored
from .sharing.cache import current_stream
from .units import GenFTUpdate
from .update import Frozen, apply_factors, compute_dtype

Asked = tuple[object, ...]


def asked(x: Tensor, bias: Tensor | None, updates: Sequence[GenFTUpdate]) -> Asked | None:
    """All that checks, dtypes and the choice of a backend depend on, beside what is watched; None on the long road.

    That is taken in training, with gradients, for several updates or blocks of a weight, and where something listens.
    """
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or len(updates) > 1:
        return None
    update = updates[0]
    if update.training or update.blocks.cut != 1 or type(x) is not Tensor:
        return None
    if _torch_private.listens():
        return None
    device = x.device
    of_bias = None if bias is None else (bias.dtype, bias.device, bias.shape)
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    modes = autocast, torch.is_inference_mode_enabled(), current_stream(device)
    return x.dtype, device, x.layout, x.shape[-1:], of_bias, update.backend, modes


def evaluated(x: Tensor, weight: Frozen, bias: Tensor | None, update: GenFTUpdate, asked: Asked) -> Tensor | None:
    """y with the factors that are at hand, or None if the layer has none that hold."""
    generator = update.generator
    factors = generator.group.at_hand(update, asked)
    if factors is None:
        return None
    config = generator.config
    if x.device.type == "cpu" and update.backend in ("auto", "eager") and not torch.is_autocast_enabled("cpu"):
        # Nothing is left to choose or to cast.
        h, b, stream = factors[0]
        settings = None, config.scaling, config.outer_activation, 0.0, stream
        return backends.load("eager").linear(x, weight, bias, h, b, *settings)[0]
    dtype, psi = compute_dtype(x), config.outer_activation
    backend = backends.choose(update.backend, x.device, dtype, not is_factored(psi, 0.0))
    return apply_factors(x, weight, bias, factors[0], config.scaling, psi, 0.0, None, backend)
