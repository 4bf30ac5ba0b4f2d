"""After each step of an optimizer: versions tell of it, and of a generator that nothing trains there is a warning.

Kernels of fused optimizers, and of other libraries', write to parameters where no version tells: factors of before the
step would be taken after it, and a graph of before it be run backward over what the parameters are by then.

A generator is left out where an optimizer trains layers' own units, and nothing those that they share. Generators are
registered on the model that was adapted. What is taken out of it, as in `Siamese(model.encoder)` or a copy of
`model.encoder`, computes with them, but they are not among its parameters; nor is a generator that was put in another's
place one that the layers compute with.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, cast

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from .arguments import warn
from .generator import GenFTGenerator
from .sharing.cache import all_groups

if TYPE_CHECKING:
    from .units import GenFTUpdate

# Steps on layers' own units since the last one on their generator. Two optimizers may step in turn, so one is no sign.
_steps_without: weakref.WeakKeyDictionary[GenFTGenerator, int] = weakref.WeakKeyDictionary()


@functools.cache
def watch_optimizers() -> None:
    """Look at every optimizer's steps from now on."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    parameters = [parameter for part in optimizer.param_groups for parameter in part["params"]]
    stepped, trains = set(map(id, parameters)), False
    for group in all_groups():
        layers = cast("list[GenFTUpdate]", group.layers)  # nothing else has a group
        if not layers:
            continue
        generator = layers[0].generator
        shared = list(generator.parameters())
        if any(id(p) in stepped for p in shared):
            _steps_without[generator], trains = 0, True
        elif any(id(p) in stepped for layer in layers for p in layer.specific_parameters().values()):
            trains = True
            _warn_of(generator, any(p.requires_grad and p.grad is not None for p in shared))
    if trains:  # other models' are left alone
        increment_version([p for p in parameters if p.grad is not None])  # without one it was not stepped


def _warn_of(generator: GenFTGenerator, has_gradients: bool) -> None:
    """At the second step in a row."""
    steps = _steps_without[generator] = _steps_without.get(generator, 0) + has_gradients
    if has_gradients and steps == 2:
        warn(
            f"an optimizer steps the layers' own units of shape {generator.in_features}x{generator.out_features}, but "
            "not the generator that they share, which has gradients, too: it is not a part of what is trained. "
            "Register it there (part.genft_generators = model.genft_generators), so that it is trained and saved, or "
            "freeze it"
        )
