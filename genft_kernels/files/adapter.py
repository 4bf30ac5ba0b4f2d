"""Saving the adapter of a model, and loading one into a model: `save_adapter` and `load_adapter`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ..adapt import GENERATORS, adapted_layers, adapter_state, apply_genft, check_enabled, is_adapted, remove_genft
from ..config import GenFTConfig
from .format import (
    CONFIG_FILE,
    FORMAT,
    MODULES_TO_SAVE,
    AdapterFile,
    Fingerprint,
    read_adapter_file,
    read_json,
    write_adapter_file,
)


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the adapter of `model` to `directory`, which is made if need be.

    `adapter_model.safetensors` holds the trained tensors under their names in the model, and `modules_to_save`'s
    as `modules_to_save.<path>...`; `adapter_config.json` the configuration and a fingerprint of every adapted
    weight. A failure leaves files that were there before as they were.

    Raises:
        RuntimeError: the model has no adapter, is offloaded, or is within `disabled`.
        OSError: the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in _adapter_tensors(model).items()}
    write_adapter_file(directory, AdapterFile(adapter_state(model).config, tensors, _fingerprints(model)))


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Load an adapter into `model` and return it.

    A model without an adapter is adapted first, as the file says; one that is adapted already must have the same
    configuration. Besides this package's files it reads official checkpoints: the PEFT variant's folder, and the
    ViT variant's with `best_model.pt` and `args.yaml`.

    Raises:
        FileNotFoundError: no adapter in `directory`.
        ValueError: the files are damaged, a tensor is missing, unexpected or of another shape, or the adapter was
            trained on another base model; the message names the file, tensor or layer. The model is as it was.
        RuntimeError: the model is merged, offloaded, or within `disabled`.
    """
    adapter = _read(directory)
    was_adapted = is_adapted(model)
    if was_adapted:
        _check_same_config(adapter_state(model).config, adapter.config)
    else:
        apply_genft(model, adapter.config)
    try:
        destinations = _adapter_tensors(model)
        _check_base(model, adapter.fingerprints)
        _check_tensors(destinations, adapter.tensors)
    except BaseException:
        if not was_adapted:
            remove_genft(model)
        raise
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            destinations[name].copy_(tensor)
    return model


def _read(directory: str | os.PathLike) -> AdapterFile:
    config_path = Path(directory) / CONFIG_FILE
    if config_path.exists() and read_json(config_path).get("format") == FORMAT:
        return read_adapter_file(directory)
    from .official import read_official  # needed by few

    return read_official(directory)


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in a file; those of `model` itself, not copies."""
    state, layers = adapter_state(model), adapted_layers(model)
    check_enabled(model)
    tensors = dict(getattr(model, GENERATORS).named_parameters(prefix=GENERATORS))
    for path, layer in layers.items():
        tensors |= {f"{path}.{name}": getattr(layer, name) for name in layer.specific_names}
    for path in state.saved_modules:
        saved = model.get_submodule(path).state_dict(keep_vars=True)
        tensors |= {f"{MODULES_TO_SAVE}{path}.{name}": tensor for name, tensor in saved.items()}
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise RuntimeError(f"{name!r} is on the meta device: bring the offloaded model back first")
    return tensors


def _fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    return {path: Fingerprint.of(layer.frozen_weight) for path, layer in adapted_layers(model).items()}


def _check_same_config(mine: GenFTConfig, theirs: GenFTConfig) -> None:
    mine, theirs = mine.to_dict(), theirs.to_dict()
    differing = [
        f"{name}: {mine[name]!r} in the model, {theirs[name]!r} in the file"
        for name in mine
        if mine[name] != theirs[name]
    ]
    if differing:
        raise ValueError(f"the model is adapted with another configuration ({'; '.join(differing)})")


def _check_base(model: nn.Module, fingerprints: dict[str, Fingerprint] | None) -> None:
    layers = adapted_layers(model)
    for path, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{path!r} is merged: call unmerge(model) before loading an adapter")
    if fingerprints is None:
        return
    if set(fingerprints) != set(layers):
        differing = sorted(set(fingerprints) ^ set(layers))
        raise ValueError(f"the adapter belongs to another base model: its layers differ, first at {differing[0]!r}")
    for path, mine in _fingerprints(model).items():
        difference = fingerprints[path].difference(mine)
        if difference:
            raise ValueError(f"the adapter belongs to another base model: the weight of {path!r}: {difference}")


def _check_tensors(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        problems = [f"missing {', '.join(missing[:3])}"] * bool(missing) + [
            f"unexpected {', '.join(extra[:3])}"
        ] * bool(extra)
        count = f" ({len(missing)} missing, {len(extra)} unexpected)"
        raise ValueError(f"the adapter's tensors do not fit the model: {'; '.join(problems)}{count}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"tensor {name!r} has shape {list(tensor.shape)}, the model wants {list(wanted[name].shape)}"
            )
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, the model wants {wanted[name].dtype}")
