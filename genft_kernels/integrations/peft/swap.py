"""`swap_adapter`: another adapter of the same kind takes an adapter's place, in a model that goes on serving."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights

from ...files.names import PEFT_WRAPPER
from .config import PeftGenFTConfig
from .model import check_base, layers_with


@torch.no_grad()
def swap_adapter(model: Any, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Give the adapter `adapter_name` of `model` the tensors of the one in `directory`, in place.

    No layer or tensor is replaced, so compiled graphs and whatever holds the model go on. PEFT's `hotswap_adapter`
    does this for LoRA alone.

    Args:
        model: a `PeftModel`, or a model of transformers with adapters of its `add_adapter`; compiled or not.
        directory: of an adapter that PEFT or `save_adapter` has saved.

    Raises:
        ValueError: there is no such GenFT adapter, or it is merged; or the other is not of the same settings, layers
            and base model. Nothing has changed then.
    """
    model = getattr(model, "_orig_mod", model)
    mine = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(mine, PeftGenFTConfig):
        raise ValueError(f"the model has no GenFT adapter {adapter_name!r}")
    merged = (each.merged_adapters for each in model.modules() if isinstance(each, BaseTunerLayer))
    if any(adapter_name in names for names in merged):
        raise ValueError(f"the adapter {adapter_name!r} is merged: call unmerge_adapter() first")
    theirs = PeftConfig.from_pretrained(os.fspath(directory))
    if not isinstance(theirs, PeftGenFTConfig):
        raise ValueError(f"{directory} holds an adapter of another kind: {theirs.peft_type}")
    ours, new = mine.native().to_dict(), theirs.native().to_dict()
    if other := [f"{name}: {ours[name]!r}, not {new[name]!r}" for name in ours if ours[name] != new[name]]:
        raise ValueError(f"the adapter in {directory} has other settings ({'; '.join(other)[:1000]})")
    frozen = model.get_base_model() if isinstance(model, PeftModel) else model
    check_base(theirs, frozen)
    present = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    present = _without_wrapper(present)  # not copies
    tensors = _without_wrapper(load_peft_weights(os.fspath(directory), device="cpu"))
    shapes, given = ({name: tuple(t.shape) for name, t in some.items()} for some in (present, tensors))
    different = {name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)}
    if theirs.trained_on:
        different |= theirs.trained_on.keys() ^ layers_with(adapter_name, frozen).keys()
    if different:
        raise ValueError(f"the adapter in {directory} is of other layers or shapes, first at {min(different)!r}")
    for name, tensor in present.items():
        tensor.copy_(tensors[name])


def _without_wrapper(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(PEFT_WRAPPER): tensor for name, tensor in tensors.items()}
