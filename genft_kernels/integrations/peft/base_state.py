"""PEFT's `get_base_model_state_dict` and its inverse, which know of no tensors of an adapter beside its layers'."""

from __future__ import annotations

from typing import Any

from peft.utils import save_and_load

from .layer import SHARED

_of_layers = save_and_load._get_adapter_state_dict_key_prefixes


def adapter_key_prefixes(model: Any) -> set[str]:
    """Prefixes of the adapters' keys in the wrapped model, as PEFT's function of that name; shared ones, too.

    The model has these, because transformers' `add_adapter` keeps no tuner.
    """
    return _of_layers(model) | ({SHARED} & set(model.base_model.model._modules))


def install() -> None:
    """Put it in the place of PEFT's."""
    save_and_load._get_adapter_state_dict_key_prefixes = adapter_key_prefixes
