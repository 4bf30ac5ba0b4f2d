"""Adapting a whole model in place: `apply_genft`, `remove_genft` and what acts on all its adapted layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backends
from .adaptable import check_not_wrapped
from .adapted_model import (
    GENERATORS,
    STATE,
    Adapted,
    AdapterState,
    adapted_layers,
    adapter_state,
    check_enabled,
    check_not_of_peft,
    is_adapted,
    layer_without_adapter,
    layers_of_an_adapted_model,
    lost_layers,
)
from .arguments import about, check_flag, check_type
from .config import GenFTConfig, check_config
from .defaults import settled
from .experts.layer import GenFTExperts
from .experts.targets import ExpertTarget, find_expert_targets, make_experts
from .first_forward import FirstForward
from .frozen_weight import FrozenWeight
from .generator import GenFTGenerator, SharedTensors
from .heads import warn_of_fresh_heads
from .instance_forward import carry_instance_forward
from .matching import FullMatch, full_matches, put
from .modules import MORE_BLOCKS, GenFTLinear
from .parameters import shared_shapes, specific_shapes
from .quantised_linear import QuantisedGenFTLinear, frozen_dtype, mergeable_layers
from .saved_modules import beside, check_can_return, keep_untied, let_tie, say_untied, trained_copies
from .targets import Target, find_modules_to_save, find_targets, warn_of_unmatched, weight_of
from .units import adapter_dtype


def apply_genft(model: nn.Module, config: GenFTConfig, *, backend: str = "auto") -> nn.Module:
    """Adapt `model` in place and return it.

    Every targeted `nn.Linear` (or transformers `Conv1D`) becomes a `GenFTLinear` that shares its weight; layers of
    one weight shape share one generator, registered on the model as `genft_generators.{in}x{out}`. All else is
    frozen, but for copies of `modules_to_save`. In a process group every rank calls it, and what `tune` measured for
    rank 0 is every rank's (docs/backends.md#choice).

    Args:
        config: the method's settings and the choice of modules.
        backend: for every adapted layer; "auto", or one by name.

    Raises:
        ValueError, TypeError: nothing is targeted, or a layer cannot be adapted; the message names it.
        RuntimeError: the model is adapted already. In each case the model is as it was.
    """
    backends.check_name(backend)
    config = settled(model, config)
    adapt_as_planned(model, config, find_plan(model, config), backend)
    warn_of_fresh_heads(model)
    backends.choices.agree()
    return model


class Plan(NamedTuple):
    """The layers that `apply_genft` will adapt, and the paths of the modules that it will train in full."""

    targets: list[Target]
    experts: list[ExpertTarget]
    to_save: list[str]

    @property
    def names(self) -> list[str]:
        """The paths of the layers that it adapts, each once."""
        return [*(target.name for target in self.targets), *(stack.name for stack in self.experts)]

    def tensor_shapes(self, config: GenFTConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of all that will train in generators and layers, by its name in the model."""
        blocks: dict[str, tuple[int, int]] = {}  # the shape of what it adapts, by the path of a layer's own units
        own: dict[str, Mapping[str, tuple[int, ...]]] = {}
        for target in self.targets:
            for index, block in enumerate(target.blocks_by_shape()):
                owner = f"{target.name}.{MORE_BLOCKS}.{block[1]}" if index else target.name
                blocks[owner], own[owner] = block, specific_shapes(config, *block)
        for stack in self.experts:
            blocks[stack.name], own[stack.name] = stack.layout.block_shape, stack.own_shapes(config)
        shared = {f"{GENERATORS}.{_key(block)}": shared_shapes(config, *block) for block in blocks.values()}
        return {f"{owner}.{name}": shape for owner, shapes in (shared | own).items() for name, shape in shapes.items()}


def find_plan(model: nn.Module, config: GenFTConfig, full_matches: FullMatch = full_matches) -> Plan:
    """Find what `config` names in `model`; arguments and errors of `apply_genft`, nothing is changed."""
    check_type("model", model, nn.Module)
    check_config(config)
    check_not_wrapped(model)
    if not is_adapted(model):
        check_not_of_peft(model)
    if (layer := layer_without_adapter(model)) is not None:
        raise RuntimeError(
            f"the model has GenFT layers already, such as {layer!r}, made by hand or as part of another adapted model: "
            "put plain layers in their place first"
        )
    if is_adapted(model) or any(isinstance(module, (GenFTLinear, GenFTExperts)) for module in model.modules()):
        raise RuntimeError("the model has GenFT layers already: call remove_genft(model) first")
    if hasattr(model, GENERATORS):
        raise ValueError(f"the model has an attribute {GENERATORS!r} of its own")
    experts = find_expert_targets(model, config, full_matches)
    names_modules = config.target_modules is not None or config.fused_blocks is not None
    targets = find_targets(model, config, full_matches) if names_modules or not experts else []
    to_save = find_modules_to_save(model, config, [*targets, *experts])
    warn_of_unmatched(model, config, full_matches)
    return Plan(targets, experts, to_save)


def adapt_as_planned(model: nn.Module, config: GenFTConfig, plan: Plan, backend: str = "auto") -> None:
    """The second half of `apply_genft`."""
    targets, stacks, to_save = plan
    required_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    # What can fail is done before the model is touched, but that adapting freezes a weight.
    generators = _make_generators(targets, stacks, config)
    trained = trained_copies(model, to_save)
    saved = {name: model.get_submodule(name) for name in to_save}
    try:
        layers = [_make_layer(target, generators, backend) for target in targets]
        experts, updates = make_experts(stacks, generators, backend)
    except BaseException:
        _restore_required_grad(model, required_grad)
        raise

    model.requires_grad_(False)
    for target, layer in zip(targets, layers, strict=True):
        for name in target.names:
            put(model, name, layer)
    for name, module in (experts | trained).items():
        put(model, name, module)
    setattr(model, GENERATORS, SharedTensors({_key(shape): generator for shape, generator in generators.items()}))
    keep_untied(model, to_save)
    by_name = {target.name: layer for target, layer in zip(targets, layers, strict=True)} | updates
    # Of experts that are disabled the module alone is called.
    called: dict[str, nn.Module] = {**by_name, **{name: update.experts for name, update in updates.items()}}
    setattr(model, STATE, AdapterState(config, required_grad, saved, tuple(by_name), FirstForward(model, called)))


def remove_genft(model: nn.Module, *, keep_update: bool = False, dequantize: bool = False) -> nn.Module:
    """Undo `apply_genft` exactly, merged or not, and return the model.

    Args:
        keep_update: leave the fine-tuned model instead: plain layers whose weight is W + dW, as `merge` makes it, and
            the trained `modules_to_save`. It needs this package no longer, and its state dict has the names it had.
            Where that ends a tie of embeddings, the model's configuration says so, with a warning.
        dequantize: with `keep_update`, leave dense layers in the place of adapted ones whose weight is quantised, in
            the dtype of the model's frozen parameters; layers that were not adapted stay as they are.

    Raises:
        RuntimeError: the model is not adapted, or within `disabled`; or an adapted layer is quantised, and
            `keep_update` is without `dequantize`; or its weight is gone, since it was resized while merged.
        ValueError: `dequantize` without `keep_update`.
    """
    check_flag("keep_update", keep_update)
    check_flag("dequantize", dequantize)
    if dequantize and not keep_update:
        raise ValueError("dequantize=True needs keep_update=True: without it the quantised layers come back")
    state = adapter_state(model)
    check_enabled(model)
    dtype = frozen_dtype(model) if dequantize else None
    if keep_update:
        mergeable = mergeable_layers(adapted_layers(model), leave_out=dequantize)
        _merge_layers([layer for layer in mergeable if not layer.merged])
    else:
        check_can_return(state.saved_modules, model)
        if state.merged and (lost := lost_layers(state, adapted_layers(model))):
            raise RuntimeError(
                f"the adapted layer {lost[0]!r} has been replaced or resized while it was merged, so its weight cannot "
                "come back: remove_genft(model, keep_update=True) leaves what was trained"
            )
    state.first_forward.stop()
    present = {id(module) for module in model.modules()}
    places = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (GenFTLinear, GenFTExperts))
    }
    plain = {layer: _plain(layer, keep_update, present, dtype) for layer in dict.fromkeys(places.values())}
    for name, layer in places.items():
        put(model, name, plain[layer])
    saved = {} if keep_update else state.saved_modules
    for name, original in saved.items():
        put(model, name, beside(original, model.get_submodule(name)))
    let_tie(model)
    delattr(model, GENERATORS)
    delattr(model, STATE)
    _restore_required_grad(model, state.required_grad)
    if keep_update:
        say_untied(model, (*state.layers, *state.saved_modules))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Merge the update into the weight of every adapted layer (`GenFTLinear.merge`), or of none on failure.

    In 16 bits W + dW is rounded to nearest, which takes small updates away: of one of a thousandth of W less than half
    is left in bfloat16. Merge `model.float()`, or serve unmerged; `fidelity_report` shows what is left. Until
    `unmerge`, a transformers model's `tie_weights` leaves these weights alone.

    Raises:
        RuntimeError: the model has no adapter, or a layer is merged already or quantised; the message names it.
    """
    layers = layers_of_an_adapted_model(model)
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name!r} is merged already: call unmerge(model) first")
    _merge_layers(mergeable_layers(layers))
    state = adapter_state(model)
    state.merged = True
    keep_untied(model, [*state.saved_modules, *layers])
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Give every adapted layer its frozen weight back, bit for bit.

    Raises:
        RuntimeError: the model has no adapter, or a layer is not merged; the message names it.
    """
    layers = layers_of_an_adapted_model(model)
    for name, layer in layers.items():
        if not layer.merged:
            raise RuntimeError(f"{name!r} is not merged")
    for layer in layers.values():
        layer.unmerge()
    state = adapter_state(model)
    state.merged = False
    keep_untied(model, state.saved_modules)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the frozen model answers, `modules_to_save` included (the reference policy of DPO).

    Raises:
        RuntimeError: the model has no adapter.
    """
    layers = layers_of_an_adapted_model(model).values()
    saved = adapter_state(model).saved_modules
    check_can_return(saved, model)
    enabled = [layer.enabled for layer in layers]
    trained = {name: model.get_submodule(name) for name in saved}
    try:
        for layer in layers:
            layer.enabled = False
        for name, original in saved.items():
            put(model, name, beside(original, trained[name]))
        yield model
    finally:
        for layer, was in zip(layers, enabled, strict=True):
            layer.enabled = was
        for name, module in trained.items():
            put(model, name, module)


def _make_generators(
    targets: list[Target], stacks: list[ExpertTarget], config: GenFTConfig
) -> dict[tuple[int, int], GenFTGenerator]:
    """One generator for each shape, on the device and in the adapter dtype of its first layer."""
    users: list[tuple[str, tuple[int, int], Tensor | FrozenWeight]] = [
        (f"target module {target.name!r}", shape, weight_of(target.module))
        for target in targets
        for shape in target.blocks_by_shape()
    ]
    users += [(f"target parameter {stack.name!r}", stack.layout.block_shape, stack.weight) for stack in stacks]
    generators: dict[tuple[int, int], GenFTGenerator] = {}
    for subject, shape, weight in users:
        if shape not in generators:
            with about(subject):
                generators[shape] = GenFTGenerator(*shape, config, weight.device, adapter_dtype(weight.dtype))
    return generators


def _make_layer(target: Target, generators: dict[tuple[int, int], GenFTGenerator], backend: str) -> GenFTLinear:
    (first, blocks), *others = [(generators[shape], b) for shape, b in target.blocks_by_shape().items()]
    layer = GenFTLinear.from_linear(target.module, first, blocks=blocks, backend=backend, register_generator=False)
    for generator, more in others:
        layer.adapt_more(generator, more)
    return layer


def _key(shape: tuple[int, int]) -> str:
    return "{}x{}".format(*shape)


def _merge_layers(layers: Iterable[Adapted]) -> None:
    """Merge all of them, or none on failure."""
    done: list[Adapted] = []
    try:
        for layer in layers:
            layer.merge()
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def _plain(
    layer: GenFTLinear | GenFTExperts, keep_update: bool, present: set[int], dtype: torch.dtype | None
) -> nn.Module:
    """The module that `apply_genft` found, with W or with W + dW; a dense one in `dtype` if its W is quantised."""
    if layer.merged and not keep_update:
        layer.unmerge()
    if isinstance(layer, GenFTExperts):
        return layer.release()
    if isinstance(layer, QuantisedGenFTLinear):
        return layer.release() if dtype is None else layer.made_dense(dtype)
    original = layer.__dict__["_original"]
    carry_instance_forward(layer, original)
    if keep_update and id(original) in present:
        # It is also at a path that was not adapted, which keeps W.
        original = copy.copy(original)
        original._parameters = dict(original._parameters)
    original.weight, original.bias = layer.weight, layer.bias
    return original.train(layer.training)


def _restore_required_grad(model: nn.Module, required_grad: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required_grad.get(name, parameter.requires_grad))
