"""A frozen linear layer with several updates at once: y = x (W + dW_1 + dW_2 + ...)^T + bias, in one accumulator.

A rounded output never has another one added to it (docs/method.md#precision): factored updates put their factors side
by side, which is one update again; others are folded into one transient W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import backends, reference
from .checks import check_linear, check_not_onnx, check_transforms, compute_dtype
from .config import is_factored
from .frozen_weight import FrozenWeight, frozen_linear
from .parameters import as_group
from .row_blocks import RowBlocks
from .short_road import Key, asked_again
from .units import GenFTUpdate
from .update import Action, Factors, Frozen, apply_factors, forward_seed, generate_factors


class _Part(NamedTuple):
    """One update of one block of W, generated."""

    factors: Factors
    action: Action

    @property
    def factored(self) -> bool:
        return is_factored(self.action.activation, self.action.dropout)


def updated_linear(x: Tensor, weight: Frozen, bias: Tensor | None, updates: Sequence[GenFTUpdate]) -> Tensor:
    """y [..., out] in x's dtype, or in autocast's, from the frozen W [out, in] and its updates, one at least.

    Raises:
        ValueError: the updates cut W in different ways; an argument does not fit.
    """
    y, key = asked_again(x, weight, bias, updates)
    if y is not None:
        return y
    if any(update.backend == "reference" for update in updates):
        return _specified(x, weight, bias, updates)
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return _traced(x, weight, bias, updates)
    check_linear(x, weight, bias)
    blocks = _cut(updates)
    dtype = compute_dtype(x)
    tiled = any(
        not is_factored(each.config.outer_activation, each.config.dropout if each.training else 0.0) for each in updates
    )
    backend = backends.checked_request(updates[0].backend, x.device, dtype, tiled)
    check_transforms(backend)
    of_blocks: list[list[_Part]] = [[] for _ in range(blocks.count)]
    for update in updates:
        for index, part in zip(update.blocks.adapted, _generated(update, x, dtype, backend, key), strict=True):
            of_blocks[index].append(part)
    if blocks.count == 1:
        return _applied(x, weight, bias, of_blocks[0], backend)
    outputs = [
        _applied(x, block, part_of_bias, parts, backend) if parts else frozen_linear(x, block, part_of_bias)
        for (block, part_of_bias), parts in zip(_split(blocks, weight, bias), of_blocks, strict=True)
    ]
    return torch.cat(outputs, -1)


def _cut(updates: Sequence[GenFTUpdate]) -> RowBlocks:
    """How all of the updates cut W."""
    blocks = updates[0].blocks
    for update in updates[1:]:
        if update.blocks.cut != blocks.cut:
            raise ValueError(
                f"updates of different blocks of one weight cannot act together: blocks {blocks}, and {update.blocks}"
            )
    return blocks


def _split(blocks: RowBlocks, weight: Frozen, bias: Tensor | None) -> Iterator[tuple[Any, Tensor | None]]:
    """W and the bias of each block."""
    biases: Sequence[Tensor | None] = (None,) * blocks.count if bias is None else blocks.split(bias)
    return zip(blocks.split(weight), biases, strict=True)


def _specified(x: Tensor, weight: Frozen, bias: Tensor | None, updates: Sequence[GenFTUpdate]) -> Tensor:
    """The same by the specification, in plain operations that have every derivative."""
    dense = weight.to(x.dtype) if isinstance(weight, FrozenWeight) else weight
    blocks, outputs = _cut(updates), []
    for index, (block, part_of_bias) in enumerate(_split(blocks, dense, None if bias is None else bias.to(x.dtype))):
        check_linear(x, block, part_of_bias)
        deltas = [
            reference.delta_weight(block, update.parameters_of_generator(), update.config, training=update.training)
            for update in updates
            if index in update.blocks.adapted
        ]
        outputs.append(F.linear(x, sum(deltas, block), part_of_bias))
    return outputs[0] if blocks.count == 1 else torch.cat(outputs, -1)


def _traced(x: Tensor, weight: Frozen, bias: Tensor | None, updates: Sequence[GenFTUpdate]) -> Tensor:
    """The same in operations that every traced graph has, from what the parameters are when it runs."""
    check_not_onnx()
    if any(update.training and update.config.dropout for update in updates):
        raise RuntimeError("a traced graph cannot draw dropout's masks anew: call model.eval() before torch.jit.trace")
    dtype = compute_dtype(x)
    wide = torch.promote_types(dtype, torch.float32)
    updated = sum((update.delta_weight() for update in updates), weight.to(wide))
    return F.linear(x.to(wide), updated.to(wide), None if bias is None else bias.to(wide)).to(dtype)


def _generated(update: GenFTUpdate, x: Tensor, dtype: torch.dtype, backend: str, key: Key | None) -> list[_Part]:
    """The update of each adapted block; with those of the other layers of its shape where that can be."""
    config, training = update.config, update.training
    dropout = config.dropout if training else 0.0
    seeds = [
        forward_seed(None, x.device, training, dropout, config.outer_activation, dtype) for _ in update.blocks.adapted
    ]
    if torch.compiler.is_compiling():
        check_not_onnx()
    if update.generates_alone():
        params = as_group(update.parameters_of_generator())
        factors = [
            generate_factors(
                [block], params, config, dtype=dtype, dropout=dropout, seed=seed, backend=backend
            ).unbind()[0]
            for block, seed in zip(update.adapted_blocks(), seeds, strict=True)
        ]
    else:
        factors = update.generator.group.factors_for(update, dtype, backend, seeds, key)  # type: ignore[arg-type]
    settings = config.scaling, config.outer_activation, dropout
    return [_Part(each, Action(*settings, seed)) for each, seed in zip(factors, seeds, strict=True)]


def _applied(x: Tensor, weight: Frozen, bias: Tensor | None, parts: list[_Part], backend: str) -> Tensor:
    if len(parts) == 1:
        return apply_factors(x, weight, bias, *parts[0], backend)
    if all(part.factored for part in parts):
        first = parts[0].action.scale
        equal = all(part.action.scale == first for part in parts)
        h = torch.cat([part.factors.h for part in parts], 1)  # [in, k1 + k2 + ...]
        b = torch.cat([part.factors.b if equal else part.factors.b * part.action.scale for part in parts], 1)
        action = Action(first if equal else 1.0, "identity")
        return apply_factors(x, weight, bias, Factors(h, b, parts[0].factors.stream), action, backend)
    # Made again for the backward: what is kept is x, W and the factors.
    return checkpoint(_folded, x, weight, bias, parts, use_reentrant=False, preserve_rng_state=False)


def _folded(x: Tensor, weight: Frozen, bias: Tensor | None, parts: list[_Part]) -> Tensor:
    """y by one transient W with all updates."""
    dtype = compute_dtype(x)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        folded = weight.to(wide)
        for (h, b, stream), (scale, psi, dropout, seed) in parts:
            update = reference._factored_update(folded, h, b, psi, stream, dropout, seed)
            folded = folded + scale * update
        return F.linear(x.to(wide), folded, None if bias is None else bias.to(wide)).to(dtype)
