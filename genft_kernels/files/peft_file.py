"""Adapters that PEFT has saved, by the tuner in genft_kernels/integrations/peft: our tensors, and its settings.

PEFT need not be installed to read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import GenFTConfig
from ..experts.layer import STACKED
from ..matching import Names, full_matches_in_time
from . import names
from .format import CONFIG_FILE, TENSORS_FILE, AdapterFile, check_patterns, parsed_fingerprints
from .untrusted import parse_tensors, read_file, read_json

# GenFTConfig's fields whose names PEFT has taken for something else.
RENAMED = {"bias": "generator_bias"}
# Those that choose modules, one choice in many ways; in PEFT by rules of its own.
MODULE_CHOICES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
SETTINGS = tuple(field.name for field in dataclasses.fields(GenFTConfig) if field.name not in MODULE_CHOICES)


def is_of_peft(directory: Path) -> bool:
    """Whether `directory` has an adapter that the tuner has saved."""
    path = directory / CONFIG_FILE
    return path.exists() and RENAMED["bias"] in read_json(path)


def read_peft_file(directory: Path) -> AdapterFile:
    """Read and verify the two files.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one is damaged, or PEFT has trained what this package does not; the message names the file.
    """
    config_path, tensors_path = directory / CONFIG_FILE, directory / TENSORS_FILE
    description = read_json(config_path)
    tensors = parse_tensors(read_file(tensors_path), tensors_path)
    try:
        config = _config(description, tensors)
        fingerprints = description.get("fingerprints")
        found = None if fingerprints is None else parsed_fingerprints(fingerprints)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: {error}") from None
    try:
        return AdapterFile(config, names.all_in_model(tensors), found)
    except ValueError as error:
        raise ValueError(f"{tensors_path}: {error}") from None


def _config(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> GenFTConfig:
    """The configuration that targets the layers of which there are tensors."""
    if description.get("bias", "none") != "none":
        raise ValueError(f"bias={description['bias']!r}: biases of the model itself were trained, which only PEFT does")
    settings = {
        name: description[RENAMED.get(name, name)] for name in SETTINGS if RENAMED.get(name, name) in description
    }
    layers = names.layers_in_file(tensors)
    if not layers:
        if description.get("layers_to_transform") is not None:
            raise ValueError("layers_to_transform with specific_dim=0: no tensor tells which layers are adapted")
        check_patterns(description)
        return GenFTConfig.from_dict({**settings, **{name: description.get(name) for name in MODULE_CHOICES}})
    modules, stacks = split_stacks(layers, description.get("target_parameters"))
    chosen = {"target_modules": modules, "target_parameters": stacks, "modules_to_save": _saved(description, tensors)}
    return GenFTConfig.from_dict({**settings, **chosen})


def split_stacks(paths: Iterable[str], wanted: Any) -> tuple[list[str] | None, list[str] | None]:
    """The layers, and the stacked parameters that `wanted`, the `target_parameters` of a file, names; None for none."""
    layers = set(paths)
    updates = {path.removesuffix(STACKED): path for path in layers if path.endswith(STACKED)}
    stacks = sorted(Names(updates, full_matches_in_time).matching(wanted)) if updates else []
    return sorted(layers - {updates[name] for name in stacks}) or None, stacks or None


def _saved(description: Mapping[str, Any], tensors: Iterable[str]) -> list[str] | None:
    """The names in `modules_to_save` of which there are tensors: PEFT adds all that a head may be called."""
    saved = description.get("modules_to_save")
    if not isinstance(saved, list):
        return None
    dotted = [f".{name}" for name in tensors]
    return [name for name in saved if any(f".{name}." in tensor for tensor in dotted)] or None
