"""Saving the adapter of a model, and loading one into a model: `save_adapter` and `load_adapter`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..adapt import Plan, adapt_as_planned, find_plan, remove_genft
from ..adapted_model import (
    GENERATORS,
    Adapted,
    adapted_layers,
    adapter_state,
    check_enabled,
    is_adapted,
    layers_of_an_adapted_model,
    set_backend,
)
from ..arguments import about, check_type, warn
from ..checks import SUPPORTED_DTYPES, is_sharded
from ..config import GenFTConfig
from ..defaults import settled
from ..frozen_weight import FrozenWeight
from ..matching import full_matches_in_time
from ..modules import GenFTLinear
from ..saved_modules import tied_again, unsavable
from ..targets import blocks_of, weight_of
from .fingerprint import Fingerprint
from .foreign_folder import explain_foreign_folder
from .format import AdapterFile, is_ours, read_adapter_file, write_adapter_file
from .names import MODULES_TO_SAVE
from .peft_file import MODULE_CHOICES, is_of_peft, read_peft_file
from .sharded import any_sharded, by_one, like, whole

_DENSE = torch.contiguous_format
_EXTRA_STATE = "._extra_state"
_NAMES_MODULES = (*MODULE_CHOICES, "fused_blocks")  # in one of many ways; layers and rows are compared in their place


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the adapter of `model` to `directory`, which is made if need be.

    `adapter_model.safetensors` holds the trained tensors and those of `modules_to_save`, a tensor of
    `get_extra_state` included, named as PEFT does; `adapter_config.json` the configuration and a fingerprint of every
    adapted weight. PEFT opens both once `genft_kernels.integrations.peft` is imported. Whenever it is interrupted, the
    folder holds one whole adapter, the earlier one or this. A tensor that holds NaN is saved with a warning, because
    `load_adapter` will refuse it. Of a model that FSDP2 has sharded all processes call, and the first one writes.

    Raises:
        TypeError: an argument is of the wrong type, or a module to save has an extra state that is no tensor.
        ValueError: an adapted weight holds NaN or infinity; `directory` holds a saved model of transformers.
        RuntimeError: the model has no adapter, is offloaded, or is within `disabled`; or a layer's generator is none of
            `model.genft_generators`, as that of a layer that was copied.
        OSError: the folder cannot be written, or another process has been saving into it for a minute.
    """
    check_type("model", model, nn.Module)
    check_type("directory", directory, (str, os.PathLike))
    config, tensors = adapter_state(model).config, _adapter_tensors(model) | _saved_tensors(model)
    sharded = any_sharded(tensors.values())
    by_one(partial(_check_holds_no_model, Path(directory)), sharded)
    for told in tied_again(model, adapter_state(model).saved_modules):
        raise RuntimeError(told)
    copies = {name: whole(tensor.detach()).cpu().clone(memory_format=_DENSE) for name, tensor in tensors.items()}
    for name, tensor in copies.items():
        problem = _not_finite(name, tensor)
        if problem:
            warn(f"{problem}: load_adapter will refuse it")
    fingerprints = {path: Fingerprint.of(whole(layer.frozen_weight)) for path, layer in adapted_layers(model).items()}
    for path, fingerprint in fingerprints.items():
        if not fingerprint.is_finite:
            raise ValueError(f"the frozen weight of {path!r} holds NaN or infinity, and so will its update")
    adapter = AdapterFile(config, copies, fingerprints)
    by_one(partial(write_adapter_file, directory, adapter, _base(model)), sharded)


def load_adapter(model: nn.Module, directory: str | os.PathLike, *, backend: str | None = None) -> nn.Module:
    """Load an adapter into `model` and return it.

    A model without an adapter is adapted first, as the file says; one that is adapted already must have the same
    configuration. Besides this package's files it reads those of its PEFT tuner, and official checkpoints: the PEFT
    variant's folder, and the ViT variant's with `best_model.pt` and `args.yaml`. Everything is looked at before
    anything is changed or made; a regular expression from a file has ten seconds. Of a model that FSDP2 has sharded
    all processes call, and the first one reads.

    Args:
        backend: for every adapted layer, as in `apply_genft`; None leaves those of an adapted model as they are, and
            is "auto" for others.

    Raises:
        TypeError: an argument is of the wrong type.
        FileNotFoundError: no adapter in `directory`.
        ValueError: the files are damaged, a tensor is missing, unexpected, of another shape or not finite, or the
            adapter was trained on another base model; the message names the file, tensor or layer. The model is as
            it was. Or there is no such backend.
        RuntimeError: the model is merged, offloaded, or within `disabled`.
    """
    check_type("model", model, nn.Module)
    check_type("directory", directory, (str, os.PathLike))
    if backend is not None:
        backends.check_name(backend)
    adapter = by_one(partial(read_adapter, Path(directory)), any_sharded(model.parameters()))
    was_adapted = is_adapted(model)
    if was_adapted:
        # Which layers a configuration means is compared by the layers themselves, where the file tells them.
        _check_same_config(
            adapter_state(model).config, adapter.config, but=_NAMES_MODULES if adapter.fingerprints else ()
        )
        _check_unmerged(model)
        weights = {path: layer.frozen_weight for path, layer in adapted_layers(model).items()}
        wanted = _adapter_tensors(model) | _saved_tensors(model)
    else:
        adapter = adapter._replace(config=settled(model, adapter.config))
        planned = find_plan(model, adapter.config, full_matches_in_time)
        weights = {target.name: weight_of(target.module) for target in planned.targets}
        weights |= {stack.name: stack.weight for stack in planned.experts}
        wanted = _planned_tensors(model, planned, adapter.config)
    _check_base(weights, adapter.fingerprints)
    if was_adapted:
        _check_same_blocks(model, adapter.config)
    _check_tensors(wanted, adapter.tensors)
    if not was_adapted:
        adapt_as_planned(model, adapter.config, planned)
    try:
        _take_in(model, adapter.tensors)
    except BaseException:
        if not was_adapted:
            remove_genft(model)
        raise
    return model if backend is None else set_backend(model, backend)


def _check_holds_no_model(directory: Path) -> None:
    if (directory / "config.json").exists():
        raise ValueError(
            f"{directory} holds a saved model, which transformers loads no longer with an adapter of GenFT's beside "
            "it: save the adapter into a folder of its own"
        )


def _base(model: nn.Module) -> dict[str, object]:
    """By what PEFT finds the model, if it has a name or path, as models of transformers have.

    Where it has none, null as PEFT writes it: transformers reads the field without asking whether it is there.
    """
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if not name:
        return {"base_model_name_or_path": None}
    kind = type(model)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {"base_model_name_or_path": name, "auto_mapping": mapping}


def read_adapter(directory: Path) -> AdapterFile:
    """The adapter in a folder, of whatever format `load_adapter` reads; its errors about files."""
    if is_ours(directory):
        return read_adapter_file(directory)
    if is_of_peft(directory):
        return read_peft_file(directory)
    explain_foreign_folder(directory)
    from .official import read_official  # needed by few

    return read_official(directory)


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that train in the generators and the layers of `model`, by its name in a file; no copies."""
    layers = layers_of_an_adapted_model(model)
    check_enabled(model)
    _check_generators(model, layers)
    owners = {f"{GENERATORS}.{key}": (each, each.tensor_names) for key, each in getattr(model, GENERATORS).items()}
    owners |= {
        f"{path}.{within}".rstrip("."): (update, update.specific_names)
        for path, layer in layers.items()
        for within, update in layer.updates.items()
    }
    tensors = {f"{path}.{name}": getattr(owner, name) for path, (owner, names) in owners.items() for name in names}
    for name, tensor in tensors.items():
        if not isinstance(tensor, nn.Parameter):
            raise RuntimeError(
                f"{name!r} is computed (pruned or parametrized): make that permanent first "
                "(prune.remove, parametrize.remove_parametrizations)"
            )
    _check_resident(tensors)
    return tensors


def _check_generators(model: nn.Module, layers: Mapping[str, Adapted]) -> None:
    """Raise RuntimeError where a layer shares units that a file would not hold."""
    held = set(getattr(model, GENERATORS).values())
    for path, layer in layers.items():
        if any(update.generator not in held for update in layer.updates.values()):
            raise RuntimeError(
                f"the adapted layer {path!r} has a generator that is none of model.{GENERATORS}, as a copy of a layer "
                "has: change the model before apply_genft, or call remove_genft(model), then apply_genft anew"
            )


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of the modules trained in full, by its name in a file; no copies."""
    tensors: dict[str, Tensor] = {}
    for path in adapter_state(model).saved_modules:
        tensors |= _state_of(path, model.get_submodule(path))
    _check_resident(tensors)
    return tensors


def _state_of(path: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state dict, without an extra state that is None, by their names in a file."""
    for name, kind in unsavable(module).items():
        raise TypeError(
            f"modules_to_save: {path}.{name} is of type {kind}, and only tensors can be saved: "
            "let get_extra_state return a tensor or None"
        )
    state = module.state_dict(keep_vars=True)
    return {f"{MODULES_TO_SAVE}{path}.{name}": value for name, value in state.items() if value is not None}


def _check_resident(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise RuntimeError(f"{name!r} is on the meta device: bring the offloaded model back first")


def _planned_tensors(model: nn.Module, planned: Plan, config: GenFTConfig) -> dict[str, Tensor]:
    """The tensors that the model will have once it is adapted; what adapting makes has no values."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in planned.tensor_shapes(config).items()}
    for path in planned.to_save:
        tensors |= _state_of(path, model.get_submodule(path))
    return tensors


def _check_same_config(mine: GenFTConfig, theirs: GenFTConfig, but: Collection[str]) -> None:
    in_model, in_file = mine.to_dict(), theirs.to_dict()
    if not mine.target_parameters:  # no experts
        but = (*but, "expert_specific")
    differing = [
        f"{name}: {in_model[name]!r} in the model, {in_file[name]!r} in the file"
        for name in in_model
        if name not in but and in_model[name] != in_file[name]
    ]
    if differing:
        raise ValueError(f"the model is adapted with another configuration ({'; '.join(differing)[:1000]})")


def _check_same_blocks(model: nn.Module, in_file: GenFTConfig) -> None:
    """Raise ValueError where the file adapts other rows of a layer, whatever name and cut say so."""
    layers = {path: layer for path, layer in adapted_layers(model).items() if isinstance(layer, GenFTLinear)}
    for path, layer in layers.items():
        mine, theirs = layer.all_blocks, blocks_of(in_file, path)
        with about(f"the file's blocks of {path!r}"):
            rows = theirs.adapted_rows(layer.out_features)
        if rows != mine.adapted_rows(layer.out_features):
            differing = f"fused_blocks: of {path!r} {mine} in the model, {theirs} in the file"
            raise ValueError(f"the model is adapted with another configuration ({differing})")


def _check_unmerged(model: nn.Module) -> None:
    check_enabled(model)
    for path, layer in adapted_layers(model).items():
        if layer.merged:
            raise RuntimeError(f"{path!r} is merged: call unmerge(model) before loading an adapter")


def _check_base(weights: Mapping[str, Tensor | FrozenWeight], fingerprints: Mapping[str, Fingerprint] | None) -> None:
    if fingerprints is None:
        return
    if set(fingerprints) != set(weights):
        differing = sorted(set(fingerprints) ^ set(weights))
        raise ValueError(f"the adapter belongs to another base model: its layers differ, first at {differing[0]!r}")
    for path, weight in weights.items():
        difference = fingerprints[path].difference(Fingerprint.of(whole(weight)))
        if difference:
            raise ValueError(f"the adapter belongs to another base model: the weight of {path!r}: {difference}")


def _check_tensors(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        differing = {"missing": missing, "unexpected": extra}
        problems = "; ".join(f"{kind} {', '.join(names[:3])}" for kind, names in differing.items() if names)
        count = f" ({len(missing)} missing, {len(extra)} unexpected)"
        raise ValueError(f"the adapter's tensors do not fit the model: {problems[:1000]}{count}")
    for name, tensor in found.items():
        shape, dtype = wanted[name].shape, wanted[name].dtype
        if tensor.shape != shape and not name.endswith(_EXTRA_STATE):
            raise ValueError(f"tensor {name!r} has shape {list(tensor.shape)}, the model wants {list(shape)}")
        trained = not name.startswith(MODULES_TO_SAVE)
        fits = tensor.dtype in SUPPORTED_DTYPES if trained else tensor.is_floating_point()
        if tensor.dtype != dtype and not (fits and dtype.is_floating_point):
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, the model wants {dtype}")
        problem = _not_finite(name, tensor)
        if problem:
            raise ValueError(problem)


def _not_finite(name: str, tensor: Tensor) -> str | None:
    """In words that a tensor holds what no training recovers from; a mask among the buffers may be infinite."""
    if not tensor.is_floating_point():
        return None
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # float8 cannot be asked
    if name.startswith(MODULES_TO_SAVE):
        return f"tensor {name!r} holds NaN" if tensor.isnan().any() else None
    return None if tensor.isfinite().all() else f"tensor {name!r} holds NaN or infinity"


def _take_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model the values of `tensors`, which fit it; all of them or, on failure, none."""
    saved = {path: model.get_submodule(path) for path in adapter_state(model).saved_modules}
    trained = _adapter_tensors(model)
    values = {name: like(tensors[name], mine) for name, mine in trained.items()}
    before = _copied(trained)
    state_before = {path: _copied(module.state_dict()) for path, module in saved.items()}
    try:
        for path, module in saved.items():
            prefix = f"{MODULES_TO_SAVE}{path}."
            theirs = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            mine = state_before[path]
            theirs |= {name: like(theirs[name], tensor) for name, tensor in mine.items() if is_sharded(tensor)}
            module.load_state_dict({**mine, **theirs})
        _overwrite(trained, values)
    except BaseException:
        for path, module in saved.items():
            module.load_state_dict(state_before[path])
        changed = {name: mine for name, mine in trained.items() if not torch.equal(whole(mine), whole(before[name]))}
        _overwrite(changed, before)
        raise


@torch.no_grad()
def _overwrite(mine: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in mine.items():
        tensor.copy_(values[name])


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()}
