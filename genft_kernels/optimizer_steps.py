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
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from .arguments import warn
from .generator import GenFTGenerator
from .sharing.cache import all_groups

if TYPE_CHECKING:
    from .units import GenFTUpdate

# A parameter by the layer that has it, and its name there: what it was before it was replaced. And torch could not swap
# one that there is a weak reference to.
_Place = tuple[weakref.ref[nn.Module], str]
# Since the last step on a generator: the first parameter of layers' own that was stepped, and how often. Optimizers may
# step in turn, one for each parameter even, so that only a second step on the same one is a sign.
_steps_without: weakref.WeakKeyDictionary[GenFTGenerator, tuple[_Place, int]] = weakref.WeakKeyDictionary()
# Where each parameter was found last, by its id: optimizers may be as many as layers, and all of these take long.
_owners: dict[int, _Place] = {}


@functools.cache
def watch_optimizers() -> None:
    """Look at every optimizer's steps from now on."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    parameters = [parameter for part in optimizer.param_groups for parameter in part["params"]]
    places = list(map(_place, parameters))
    if None in places:  # another model's, or new
        _look_up_owners()
        places = list(map(_place, parameters))
    generators: set[GenFTGenerator] = set()
    own: dict[GenFTGenerator, list[_Place]] = {}
    for owner, name in filter(None, places):
        if isinstance(owner, GenFTGenerator):
            generators.add(owner)
        else:
            own.setdefault(cast("GenFTUpdate", owner).generator, []).append((weakref.ref(owner), name))
    for generator in generators:
        _steps_without.pop(generator, None)
    for generator in own.keys() - generators:
        _step_without(generator, own[generator])
    if generators or own:  # other models' are left alone
        increment_version([p for p in parameters if p.grad is not None])  # without one it was not stepped


def _place(parameter: Tensor) -> tuple[nn.Module, str] | None:
    """The layer or generator that is known to have it, and still has, and its name there."""
    known = _owners.get(id(parameter))
    owner = None if known is None else known[0]()
    if known is None or owner is None:
        return None
    name = known[1]
    if owner._parameters.get(name) is parameter or dict(_tensors(owner)).get(name) is parameter:  # the first is quick
        return owner, name
    return None


def _tensors(owner: nn.Module) -> Iterable[tuple[str, Tensor]]:
    if isinstance(owner, GenFTGenerator):
        return owner.stored().items()
    return cast("GenFTUpdate", owner).specific_parameters().items()


def _look_up_owners() -> None:
    """Anew, since parameters may have been replaced."""
    _owners.clear()
    for group in all_groups():
        layers = cast("list[GenFTUpdate]", group.layers)  # nothing else has a group
        for owner in (*layers, *(layer.generator for layer in layers[:1])):
            _owners.update((id(tensor), (weakref.ref(owner), name)) for name, tensor in _tensors(owner))


def _step_without(generator: GenFTGenerator, stepped: list[_Place]) -> None:
    """Layers' own units are stepped, and not the generator: a warning at the second step in a row."""
    if not any(p.requires_grad and p.grad is not None for p in generator.parameters()):
        return
    first, steps = _steps_without.get(generator, (stepped[0], 0))
    if first[0]() is None:  # the layer is gone
        first = stepped[0]
    if first not in stepped:
        return
    _steps_without[generator] = first, steps + 1
    if steps + 1 == 2:
        warn(
            f"an optimizer steps the layers' own units of shape {generator.in_features}x{generator.out_features}, but "
            "not the generator that they share, which has gradients, too: it is not a part of what is trained. "
            "Register it there (part.genft_generators = model.genft_generators), so that it is trained and saved, or "
            "freeze it"
        )
