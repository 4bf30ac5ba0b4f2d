"""An adapted model: what it remembers, its adapted layers, and what is asked and set of all of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import backends
from .arguments import check_type, warn
from .config import GenFTConfig
from .experts.update import ExpertUpdate
from .modules import GenFTLinear, MoreBlocks
from .saved_modules import check_not_quantised, tied_again
from .targets import check_gradients_pass
from .units import GenFTUpdate

if TYPE_CHECKING:
    from .first_forward import FirstForward

GENERATORS = "genft_generators"
STATE = "_genft_state"
# Layers with a W of their own: a linear layer, or one stacked parameter of experts.
Adapted = GenFTLinear | ExpertUpdate


@dataclasses.dataclass
class AdapterState:
    """A record of an adapted model, by which it can be undone exactly. It is not part of the state dict."""

    config: GenFTConfig
    required_grad: dict[str, bool]  # by parameter name, as it was before
    saved_modules: dict[str, nn.Module]  # the originals of `modules_to_save`, by path
    layers: tuple[str, ...]  # the adapted ones, by path
    first_forward: FirstForward
    merged: bool = False  # by `merge`


def is_adapted(model: nn.Module) -> bool:
    """Whether `apply_genft` has been called on this very module."""
    return STATE in vars(model)  # not hasattr: wrappers such as torch.compile's answer for what they wrap


def adapter_state(model: nn.Module) -> AdapterState:
    """The state that `apply_genft` left on `model`; RuntimeError if there is none."""
    check_type("model", model, nn.Module)
    if not is_adapted(model):
        check_not_of_peft(model)
        if (layer := layer_without_adapter(model)) is not None:
            raise RuntimeError(
                f"the model has no GenFT adapter of its own, but GenFT layers such as {layer!r}: if it is a part of an "
                "adapted model, pass the whole; layers made by hand are saved by state_dict, merged by layer.merge()"
            )
        raise RuntimeError(
            "the model has no GenFT adapter: call apply_genft(model, config), and pass that very model, no wrapper"
        )
    return vars(model)[STATE]


def layer_without_adapter(model: nn.Module) -> str | None:
    """The path of a GenFT layer, if there is one, and no module of the model is what `apply_genft` has adapted."""
    return None if any(map(is_adapted, model.modules())) else next(iter(adapted_layers(model)), None)


def is_enabled(model: nn.Module) -> bool:
    """Whether the adapter answers: not within `disabled(model)`, where originals stand in for the trained modules."""
    return all(layer.enabled for layer in adapted_layers(model).values())


def updates_of_peft(model: nn.Module) -> list[GenFTUpdate]:
    """The updates in layers of PEFT's tuner."""
    updates = [module for module in model.modules() if isinstance(module, GenFTUpdate)]
    return [
        each for each in updates if not isinstance(each, (GenFTLinear, MoreBlocks)) and type(each) is not ExpertUpdate
    ]


def check_not_of_peft(model: nn.Module) -> None:
    """Raise RuntimeError where the adapter is PEFT's: its functions are others."""
    if updates_of_peft(model):
        raise RuntimeError(
            "the model's GenFT adapter is one of PEFT's, which has functions of its own: save_pretrained, "
            "merge_adapter, disable_adapter, unload. What save_pretrained has written load_adapter(base, directory) "
            "reads, for export_lora and the like"
        )


def check_enabled(model: nn.Module) -> None:
    """Raise RuntimeError within `disabled(model)`."""
    if not is_enabled(model):
        raise RuntimeError("the adapter is disabled: leave the context of disabled(model) first")


def adapted_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, Adapted]:
    """The adapted layers by path."""
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    return {name: module for name, module in modules if isinstance(module, Adapted)}


def layers_of_an_adapted_model(model: nn.Module) -> dict[str, Adapted]:
    state, layers = adapter_state(model), adapted_layers(model)
    if lost := lost_layers(state, layers):
        raise RuntimeError(
            f"the adapted layer {lost[0]!r} has been replaced or resized (as resize_token_embeddings does to an output "
            "layer), and its update does not fit: call remove_genft(model), then apply_genft anew"
        )
    return layers


def lost_layers(state: AdapterState, layers: Mapping[str, Adapted]) -> list[str]:
    """The paths of adapted layers that are no longer there, or are larger than their updates."""
    return [name for name in state.layers if name not in layers or _has_grown(layers[name])]


def _has_grown(layer: Adapted) -> bool:
    shape, generator = layer.frozen_weight.shape, layer.generator
    if len(shape) != 2 or shape[1] != generator.in_features:  # its storage is away, with FSDP for example
        return False
    cut = layer.blocks.cut
    return shape[0] != (generator.out_features * cut if isinstance(cut, int) else sum(cut))


def updates_of(model: nn.Module) -> list[GenFTUpdate]:
    """The generated updates of a model of PEFT's, or of one that `apply_genft` made; RuntimeError if it is neither."""
    check_type("model", model, nn.Module)
    if not is_adapted(model) and (of_peft := updates_of_peft(model)):
        return of_peft
    return [update for layer in layers_of_an_adapted_model(model).values() for update in layer.updates.values()]


def warn_if_tied_again(model: nn.Module) -> None:
    """Warn of trained modules whose parameters the model has elsewhere, too, in whatever way that came.

    Within `disabled` the originals stand in for them, which may be tied as ever.
    """
    for told in tied_again(model, adapter_state(model).saved_modules) if is_enabled(model) else ():
        warn(told)


def look_once(model: nn.Module) -> None:
    """Look, after its first forward, at what may have been done to a model since it was adapted.

    Raises, in training:
        TypeError: a layer has been quantised that no gradient passes, or that is to train.
    """
    warn_if_tied_again(model)
    if not (torch.is_grad_enabled() and model.training):
        return
    for path in adapter_state(model).saved_modules:
        check_not_quantised(path, model.get_submodule(path))
    check_gradients_pass(model, {layer: name for name, layer in adapted_layers(model).items()})


def explain(model: nn.Module) -> str:
    """`backends.explain` for an adapted model, and which of its layers are generated together, or why they are not.

    Returns:
        Lines to print; first the backends that layers have by name, to which the choice of "auto" is nothing.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: the model has no adapter.
    """
    updates = updates_of(model)
    groups = dict.fromkeys(update.generator.group for update in updates)
    weight = updates[0].frozen_weight
    by_name = Counter(update.backend for update in updates if update.backend != "auto")
    named = [f'backend="{name}", by name, in {count} of {len(updates)} layers' for name, count in by_name.items()]
    return "\n".join([*named, backends.explain(weight.device, weight.dtype, groups)])


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Have every adapted layer of `model` compute by `backend` from its next forward on, and return the model.

    Args:
        model: adapted by `apply_genft` or by PEFT's tuner.
        backend: "auto", or one by name, which then never becomes another.

    Raises:
        ValueError: no such backend.
        RuntimeError: the model has no adapter.
    """
    backends.check_name(backend)
    for update in updates_of(model):
        update.backend = backend
    return model
