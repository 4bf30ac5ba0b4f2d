"""Optimizer groups at rates that fit the method: shared units slower, heads at a rate of their own."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .adapted_model import adapter_state, is_adapted
from .arguments import check_type, is_finite, shown
from .generator import GenFTGenerator
from .matching import upwards
from .units import GenFTUpdate

# PEFT keeps the trained copy of a module at its path, then this, then the adapter's name.
_PEFT_COPIES = "modules_to_save"


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    head_lr: float | None = None,
    shared_lr_factor: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups of all that trains in a model, for any optimizer: `AdamW(parameter_groups(model, 4e-3, head_lr=1e-2))`.

    A step of a shared unit moves all its layers alike, so what reaches the outputs grows with their number; Adam does
    not see that. Dividing the rate by its square root is what a study found best (docs/using.md#choosing-settings).
    Models of `apply_genft`, models made of `GenFTLinear` and PEFT's are taken, wrapped ones too.

    Args:
        lr: the rate of the layers' own units, and of what trains besides.
        head_lr: that of `modules_to_save`; None is `lr`.
        shared_lr_factor: shared units train at `lr` times this; None is 1 / sqrt(number of layers of their generator),
            where each adapted block of a fused weight counts.
        weight_decay: of every group.

    Returns:
        Dictionaries of "params", "lr", "weight_decay" and "name", which is "own", "shared {in}x{out}" or "heads".

    Raises:
        ValueError: a number is not finite or below 0; the model has no GenFT layers, or nothing that trains; a layer's
            shared units train, but are not in `model`; or `head_lr` is given, and no `modules_to_save` train.
    """
    check_type("model", model, nn.Module)
    _check_at_least_0("lr", lr)
    _check_at_least_0("weight_decay", weight_decay)
    for name, optional in (("head_lr", head_lr), ("shared_lr_factor", shared_lr_factor)):
        if optional is not None:
            _check_at_least_0(name, optional)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("nothing in the model trains")
    generators = _layers_of_generators(model)
    generator_of = {id(t): generator for generator in generators for t in trained_tensors(generator)}
    _check_within(model, trained)
    copies = _copies_in_training(model)

    groups: dict[object, dict[str, Any]] = {}
    for name, parameter in trained.items():
        generator = generator_of.get(id(parameter))
        key: object
        if generator is not None:
            factor = 1 / math.sqrt(generators[generator]) if shared_lr_factor is None else shared_lr_factor
            key, title, rate = generator, f"shared {generator.in_features}x{generator.out_features}", lr * factor
        elif not copies.isdisjoint(upwards(name)):
            key, title, rate = "heads", "heads", lr if head_lr is None else head_lr
        else:
            key, title, rate = "own", "own", lr
        group = groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": weight_decay, "name": title})
        group["params"].append(parameter)
    if head_lr is not None and "heads" not in groups:
        raise ValueError("head_lr is given, and the model has no modules_to_save that train")
    return list(groups.values())


def _check_at_least_0(name: str, value: object) -> None:
    if not is_finite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {shown(value)}")


def _layers_of_generators(model: nn.Module) -> dict[GenFTGenerator, int]:
    """The generators that layers of the model use, each with the number of weights that it serves there."""
    counts: dict[GenFTGenerator, int] = {}
    for module in model.modules():
        if isinstance(module, GenFTUpdate):
            counts[module.generator] = counts.get(module.generator, 0) + len(module.blocks.adapted)
    if not counts:
        raise ValueError("the model has no GenFT layers: call apply_genft(model, config) first")
    return counts


def trained_tensors(generator: GenFTGenerator) -> list[Tensor]:
    """A generator's trained tensors: its parameters, and those that PEFT's tuner holds for it (past hooks)."""
    return [*generator.parameters(), *generator.forward().values()]


def _check_within(model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    within = {id(parameter) for parameter in trained.values()}
    for path, module in model.named_modules():
        if isinstance(module, GenFTUpdate):
            for tensor in trained_tensors(module.generator):
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in within:
                    raise ValueError(f"the shared units of layer {path!r} are not in the model: pass the whole of it")


def _copies_in_training(model: nn.Module) -> set[str]:
    """The paths of `modules_to_save`, this package's and PEFT's."""
    copies = set()
    for path, module in model.named_modules():
        if is_adapted(module):
            copies |= {f"{path}.{name}".lstrip(".") for name in adapter_state(module).saved_modules}
        if path.rpartition(".")[2] == _PEFT_COPIES:
            copies.add(path)
    return copies
