"""Adapting a whole model in place: `apply_genft`, `remove_genft` and what acts on all its adapted layers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends
from .arguments import about, check_flag, check_type, warn
from .config import GenFTConfig, check_config
from .defaults import settled
from .experts.layer import GenFTExperts
from .experts.targets import ExpertTarget, find_expert_targets, make_experts
from .experts.update import ExpertUpdate
from .first_forward import FirstForward
from .frozen_weight import FrozenWeight
from .generator import GenFTGenerator
from .heads import warn_of_fresh_heads
from .instance_forward import carry_instance_forward
from .matching import FullMatch, full_matches
from .modules import MORE_BLOCKS, GenFTLinear, MoreBlocks
from .parameters import shared_shapes, specific_shapes
from .quantised_linear import QuantisedGenFTLinear, frozen_dtype, mergeable_layers
from .saved_modules import beside, check_can_return, keep_untied, let_tie, tied_again, trained_copies
from .targets import Target, find_modules_to_save, find_targets, frozen_weight
from .units import GenFTUpdate, adapter_dtype

GENERATORS = "genft_generators"
_STATE = "_genft_state"
# Layers with a W of their own: a linear layer, or one stacked parameter of experts.
Adapted = GenFTLinear | ExpertUpdate


@dataclasses.dataclass
class AdapterState:
    """What an adapted model remembers, so that it can be undone exactly. It is not part of the state dict."""

    config: GenFTConfig
    required_grad: dict[str, bool]  # by parameter name, as it was before
    saved_modules: dict[str, nn.Module]  # the originals of `modules_to_save`, by path
    layers: tuple[str, ...]  # the adapted ones, by path
    first_forward: FirstForward


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
    adapt_as_planned(model, config, plan(model, config), backend)
    warn_of_fresh_heads(model)
    backends.choices.agree()
    return model


class Plan(NamedTuple):
    """What `apply_genft` will do to a model: the layers it adapts, and the paths of the modules it trains in full."""

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


def plan(model: nn.Module, config: GenFTConfig, full_matches: FullMatch = full_matches) -> Plan:
    """Find what `config` names in `model`; arguments and errors of `apply_genft`, nothing is changed."""
    check_type("model", model, nn.Module)
    check_config(config)
    if is_adapted(model) or any(isinstance(module, (GenFTLinear, GenFTExperts)) for module in model.modules()):
        raise RuntimeError("the model has GenFT layers already: call remove_genft(model) first")
    if hasattr(model, GENERATORS):
        raise ValueError(f"the model has an attribute {GENERATORS!r} of its own")
    experts = find_expert_targets(model, config, full_matches)
    names_modules = config.target_modules is not None or config.fused_blocks is not None
    targets = find_targets(model, config, full_matches) if names_modules or not experts else []
    return Plan(targets, experts, find_modules_to_save(model, config, [*targets, *experts]))


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
            _set_submodule(model, name, layer)
    for name, module in (experts | trained).items():
        _set_submodule(model, name, module)
    setattr(model, GENERATORS, _Generators({_key(shape): generator for shape, generator in generators.items()}))
    keep_untied(model, to_save)
    by_name = {target.name: layer for target, layer in zip(targets, layers, strict=True)} | updates
    # Of experts that are disabled the module alone is called.
    called: dict[str, nn.Module] = {**by_name, **{name: update.experts for name, update in updates.items()}}
    watch = FirstForward(model, called, warn_if_tied_again)
    setattr(model, _STATE, AdapterState(config, required_grad, saved, tuple(by_name), watch))


def remove_genft(model: nn.Module, *, keep_update: bool = False, dequantize: bool = False) -> nn.Module:
    """Undo `apply_genft` exactly, merged or not, and return the model.

    Args:
        keep_update: leave the fine-tuned model instead: plain layers whose weight is W + dW, as `merge` makes it, and
            the trained `modules_to_save`. It needs this package no longer, and its state dict has the names it had.
        dequantize: with `keep_update`, leave dense layers in the place of adapted ones whose weight is quantised, in
            the dtype of the model's frozen parameters; layers that were not adapted stay as they are.

    Raises:
        RuntimeError: the model is not adapted, or within `disabled`; or an adapted layer is quantised, and
            `keep_update` is without `dequantize`.
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
    state.first_forward.stop()
    present = {id(module) for module in model.modules()}
    places = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (GenFTLinear, GenFTExperts))
    }
    plain = {layer: _plain(layer, keep_update, present, dtype) for layer in dict.fromkeys(places.values())}
    for name, layer in places.items():
        _set_submodule(model, name, plain[layer])
    saved = {} if keep_update else state.saved_modules
    for name, original in saved.items():
        _set_submodule(model, name, beside(original, model.get_submodule(name)))
    let_tie(model)
    delattr(model, GENERATORS)
    delattr(model, _STATE)
    _restore_required_grad(model, state.required_grad)
    return model


def is_adapted(model: nn.Module) -> bool:
    """Whether `apply_genft` has been called on this very module."""
    return _STATE in vars(model)  # not hasattr: wrappers such as torch.compile's answer for what they wrap


def adapter_state(model: nn.Module) -> AdapterState:
    """The state that `apply_genft` left on `model`; RuntimeError if there is none."""
    check_type("model", model, nn.Module)
    if not is_adapted(model):
        raise RuntimeError(
            "the model has no GenFT adapter: call apply_genft(model, config), and pass that very model, no wrapper"
        )
    return vars(model)[_STATE]


def check_enabled(model: nn.Module) -> None:
    """Raise RuntimeError within `disabled(model)`, where the originals stand in for the trained modules."""
    if not all(layer._enabled for layer in adapted_layers(model).values()):
        raise RuntimeError("the adapter is disabled: leave the context of disabled(model) first")


def adapted_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, Adapted]:
    """The adapted layers by path."""
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    return {name: module for name, module in modules if isinstance(module, Adapted)}


def merge(model: nn.Module) -> nn.Module:
    """Merge the update into the weight of every adapted layer (`GenFTLinear.merge`), or of none on failure.

    Raises:
        RuntimeError: the model has no adapter, or a layer is merged already or quantised; the message names it.
    """
    layers = layers_of_an_adapted_model(model)
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name!r} is merged already: call unmerge(model) first")
    _merge_layers(mergeable_layers(layers))
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
    enabled = [layer._enabled for layer in layers]
    trained = {name: model.get_submodule(name) for name in saved}
    try:
        for layer in layers:
            layer._enabled = False
        for name, original in saved.items():
            _set_submodule(model, name, beside(original, trained[name]))
        yield model
    finally:
        for layer, was in zip(layers, enabled, strict=True):
            layer._enabled = was
        for name, module in trained.items():
            _set_submodule(model, name, module)


def explain(model: nn.Module) -> str:
    """`backends.explain` for an adapted model, and which of its layers are generated together, or why they are not.

    Raises:
        RuntimeError: the model has no adapter.
    """
    updates = updates_of(model)
    groups = {id(update.generator.group): update.generator.group for update in updates}
    weight = updates[0].frozen_weight
    return backends.explain(weight.device, weight.dtype, groups.values())


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


def updates_of(model: nn.Module) -> list[GenFTUpdate]:
    """The generated updates of a model of PEFT's, or of one that `apply_genft` made; RuntimeError if it is neither."""
    check_type("model", model, nn.Module)
    if not is_adapted(model):
        updates = [module for module in model.modules() if isinstance(module, GenFTUpdate)]
        if of_peft := [update for update in updates if not isinstance(update, (GenFTLinear, MoreBlocks))]:
            return of_peft
    return [update for layer in layers_of_an_adapted_model(model).values() for update in layer.updates.values()]


class _Generators(nn.ModuleDict):
    """A model's generators, by shape. In an `nn.Sequential`, which calls its children in turn, they change nothing."""

    def forward(self, x: Any) -> Any:
        return x


def _make_generators(
    targets: list[Target], stacks: list[ExpertTarget], config: GenFTConfig
) -> dict[tuple[int, int], GenFTGenerator]:
    """One generator for each shape, on the device and in the adapter dtype of its first layer."""
    generators: dict[tuple[int, int], GenFTGenerator] = {}

    def make(subject: str, shape: tuple[int, int], weight: Tensor | FrozenWeight) -> None:
        if shape not in generators:
            with about(subject):
                generators[shape] = GenFTGenerator(*shape, config, weight.device, adapter_dtype(weight.dtype))

    for target in targets:
        for shape in target.blocks_by_shape():
            make(f"target module {target.name!r}", shape, frozen_weight(target.module))
    for stack in stacks:
        make(f"target parameter {stack.name!r}", stack.layout.block_shape, stack.weight)
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


def layers_of_an_adapted_model(model: nn.Module) -> dict[str, Adapted]:
    state, layers = adapter_state(model), adapted_layers(model)
    lost = [name for name in state.layers if name not in layers or _has_grown(layers[name])]
    if lost:
        raise RuntimeError(
            f"the adapted layer {lost[0]!r} has been replaced or resized (as resize_token_embeddings does to an output "
            "layer), and its update does not fit: call remove_genft(model), then apply_genft anew"
        )
    return layers


def _has_grown(layer: Adapted) -> bool:
    shape, generator = layer.frozen_weight.shape, layer.generator
    if len(shape) != 2 or shape[1] != generator.in_features:  # its storage is away, with FSDP for example
        return False
    cut = layer.blocks.cut
    return shape[0] != (generator.out_features * cut if isinstance(cut, int) else sum(cut))


def warn_if_tied_again(model: nn.Module) -> None:
    """Warn of trained modules whose parameters have been replaced by frozen ones, in whatever way."""
    for name, other in tied_again(model, adapter_state(model).saved_modules).items():
        warn(f"modules_to_save: {name!r} is tied to {other!r} again, so what was trained is gone, and it is frozen")


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


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    # Not setattr: the name keeps its place among its siblings.
    model.get_submodule(parent)._modules[name] = module


def _restore_required_grad(model: nn.Module, required_grad: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required_grad.get(name, parameter.requires_grad))
