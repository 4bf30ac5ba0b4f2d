"""The short road: a forward that asks what the layer's last one has asked is not checked and settled again.

All that is looked at each time is whether the factors hold (genft_kernels/sharing/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _torch_private, backends, ops
from .checks import compute_dtype
from .config import is_factored
from .sharing.cache import current_stream
from .units import GenFTUpdate
from .update import Action, Frozen, apply_factors

Key = tuple[object, ...]


def asked_again(
    x: Tensor, weight: Frozen, bias: Tensor | None, updates: Sequence[GenFTUpdate]
) -> tuple[Tensor | None, Key | None]:
    """(y, key): y if the factors at hand serve; else None, with the key under which this forward's factors may be found
    again, or None where they must never be.

    They serve one update of an undivided weight, where nothing listens, and in training where no seed is drawn. One
    function, since each call costs more than what it does: between two layers their weights go through the cache.
    """
    update = updates[0]
    if torch.compiler.is_dynamo_compiling() or len(updates) > 1:
        return None, None
    modes, transforms, tracing, forward_ad = _torch_private.listeners()
    listened = modes() > 0 or transforms() or tracing() or forward_ad._current_level >= 0
    if listened or update.blocks.cut != 1 or type(x) is not Tensor or x.is_meta or x.is_nested:
        return None, None
    device = x.device
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    gradients = torch.is_grad_enabled()
    stream = None if kind == "cpu" else current_stream(device)
    of_modes = autocast, gradients, torch.is_inference_mode_enabled(), stream
    of_bias = None if bias is None else (bias.dtype, bias.device, bias.shape)
    share, generator = update.share, update.generator
    config, group = generator.config, generator.group
    psi, training = config.outer_activation, update.training
    dropout = training and config.dropout  # factors of two stages have the masks of one
    key = x.dtype, device, x.layout, x.shape[-1:], of_bias, update.backend, training, of_modes
    accumulation = group.accumulation
    if accumulation is None and (share is None or share.key != key):
        return None, key
    if training and (dropout or not is_factored(psi, 0.0)):
        return None, key
    factors = None
    if accumulation is not None:
        factors = accumulation.by_key.get((update, key))
    elif share is not None:
        with group.lock:
            factors = share.held(update.watched(), generator.tensors())
    if factors is None:
        return None, key
    if kind == "cpu" and not (autocast or gradients) and update.backend in ("auto", "eager"):
        h, b, stream_of_masks = factors[0]  # nothing is left to choose or to cast
        settings = None, config.scaling, psi, 0.0, stream_of_masks
        return backends.load("eager").linear(x, weight, bias, h, b, *settings)[0], key
    if is_factored(psi, 0.0):  # PyTorch's products do it all, whatever the backend (genft_kernels/backends/plan.py)
        backend = "eager"
    else:
        backend = backends.checked_request(update.backend, device, compute_dtype(x), tiled=True)
    action = Action(config.scaling, psi)
    return apply_factors(x, weight, bias, factors[0], action, backend, ops.linear_node.unheard), key
