"""Functions of PEFT's that a tuner has no say in, and what takes their places."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import conversion
from peft.utils import save_and_load
from torch import Tensor

from ...files.thin_update import exact
from .layer import SHARED, GenFTLayer

_of_layers, _by_svd = save_and_load._get_adapter_state_dict_key_prefixes, conversion._convert_module_to_lora


def adapter_key_prefixes(model: Any) -> set[str]:
    """Prefixes of the adapters' keys in the wrapped model, as PEFT's function of that name; shared ones, too.

    The model has these, because transformers' `add_adapter` keeps no tuner.
    """
    return _of_layers(model) | ({SHARED} & set(model.base_model.model._modules))


def convert_module_to_lora(
    module: Any, rank: float, adapter_name: str = "default"
) -> tuple[Tensor | None, Tensor | None, int]:
    """(A [r, in], B [out, r], r), as PEFT's function of that name, which takes an SVD of every dW.

    In the factored form a `rank` of at least the update's own gives the factors themselves, with units of zeros up to
    `rank`; a smaller one, or a share of the energy, the largest singular values. A tiled update is left to PEFT.
    """
    if not isinstance(module, GenFTLayer):
        return _by_svd(module, rank=rank, adapter_name=adapter_name)
    if adapter_name not in module.genft_own:
        return None, None, 0  # another adapter's layer: PEFT leaves it out
    update = module.genft_own[adapter_name]
    if update.config.outer_activation != "identity":
        return _by_svd(module, rank=rank, adapter_name=adapter_name)
    whole = exact([update])
    if isinstance(rank, int):
        thin = whole.truncated(rank, None).padded(rank)
    else:
        thin = whole if rank == 1 else whole.truncated(None, rank)
    return thin.down.contiguous(), thin.up.contiguous(), thin.rank


def install() -> None:
    """Put them in the places of PEFT's."""
    save_and_load._get_adapter_state_dict_key_prefixes = adapter_key_prefixes
    conversion._convert_module_to_lora = convert_module_to_lora
