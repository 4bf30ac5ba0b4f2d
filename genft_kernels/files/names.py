"""Names of an adapter's tensors: in the model, and in files, where they are those of PEFT, which opens them so.

genft_generators.8x8.row_up             base_model.model.genft_shared.8x8_row_up
encoder.layer.0.query.specific_up       base_model.model.encoder.layer.0.query.genft_own.specific_up
modules_to_save.classifier.weight       base_model.model.classifier.weight
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..adapted_model import GENERATORS

MODULES_TO_SAVE = "modules_to_save."
PEFT_WRAPPER = "base_model.model."  # in the names of a PeftModel's tensors and of files, not of transformers' models
_GENERATORS, _SHARED, _OWN = f"{GENERATORS}.", f"{PEFT_WRAPPER}genft_shared.", ".genft_own."
T = TypeVar("T")


def in_file(name: str) -> str:
    """The name in a file of a tensor of the model."""
    if name.startswith(MODULES_TO_SAVE):
        return PEFT_WRAPPER + name.removeprefix(MODULES_TO_SAVE)
    owner, _, tensor = name.rpartition(".")
    if name.startswith(_GENERATORS):
        return f"{_SHARED}{owner.removeprefix(_GENERATORS)}_{tensor}"
    return f"{PEFT_WRAPPER}{owner}{_OWN}{tensor}" if owner else name


def in_model(name: str) -> str:
    """The inverse; a name that no tensor of an adapter has in a file stays as it is."""
    if name.startswith(_SHARED):
        shape, _, tensor = name.removeprefix(_SHARED).partition("_")
        return f"{_GENERATORS}{shape}.{tensor}"
    if not name.startswith(PEFT_WRAPPER):
        return name
    owner, own, tensor = name.removeprefix(PEFT_WRAPPER).rpartition(_OWN)
    return f"{owner}.{tensor}" if own else MODULES_TO_SAVE + tensor


def all_in_model(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of a file by their names in the model; ValueError if two have one name."""
    renamed: dict[str, T] = {}
    for name, tensor in tensors.items():
        if renamed.setdefault(in_model(name), tensor) is not tensor:
            raise ValueError(f"it holds {in_model(name)[:200]!r} twice")
    return renamed


def layers_in_file(tensors: Mapping[str, T]) -> list[str]:
    """The paths of the layers that have tensors of their own in a file."""
    owners = (name.removeprefix(PEFT_WRAPPER).rpartition(_OWN)[0] for name in tensors if name.startswith(PEFT_WRAPPER))
    return sorted({owner for owner in owners if owner})
