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
from .update import Action, Frozen, apply_factors, compute_dtype

Asked = tuple[object, ...]


def evaluated(
    x: Tensor, weight: Frozen, bias: Tensor | None, updates: Sequence[GenFTUpdate]
) -> tuple[Tensor | None, Asked | None]:
    """(y, or None on the long road; all that it depends on beside what is watched, or None where that road is a must).

    It is in training, with gradients, for several updates or blocks of a weight, and where something listens. One
    function, since each call costs more than what it does: between two layers their weights go through the cache.
    """
    update = updates[0]
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or update.training or len(updates) > 1:
        return None, None
    modes, transforms, tracing, forward_ad = _torch_private.listeners()
    listened = modes() > 0 or transforms() or tracing() or forward_ad._current_level >= 0
    if listened or update._blocks.cut != 1 or type(x) is not Tensor:
        return None, None
    device = x.device
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    of_modes = autocast, torch.is_inference_mode_enabled(), None if kind == "cpu" else current_stream(device)
    of_bias = None if bias is None else (bias.dtype, bias.device, bias.shape)
    asked = x.dtype, device, x.layout, x.shape[-1:], of_bias, update.backend, of_modes
    share, generator = update.share, update.generator
    if share is None or share.asked != asked:
        return None, asked
    with generator.group.lock:
        factors = share.held(update.watched(), generator.tensors())
    if factors is None:
        return None, asked
    config = generator.config
    if kind == "cpu" and not autocast and update.backend in ("auto", "eager"):  # nothing is left to choose or to cast
        h, b, stream = factors[0]
        settings = None, config.scaling, config.outer_activation, 0.0, stream
        return backends.load("eager").linear(x, weight, bias, h, b, *settings)[0], asked
    dtype, psi = compute_dtype(x), config.outer_activation
    backend = backends.choose(update.backend, device, dtype, not is_factored(psi, 0.0))
    return apply_factors(x, weight, bias, factors[0], Action(config.scaling, psi), backend), asked
