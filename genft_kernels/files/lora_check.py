"""An exported LoRA as PEFT understands it, beside the model that it was made from."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import merge, remove_genft
from ..adapted_model import adapted_layers
from ..experts.update import ExpertUpdate
from ..frozen_weight import FrozenWeight
from .lora_experts import lora_names

# Both compute in float32 or wider from the same tensors, in another order.
_UPDATE_TOLERANCE = 1e-4


@torch.no_grad()
def check_by_peft(
    model: nn.Module, directory: str | os.PathLike[str], inputs: Any, energy: Mapping[str, float]
) -> float:
    """How far PEFT's logits are from the model's, |difference| / |logits|.

    Args:
        directory: the LoRA adapter, as PEFT loads it.
        energy: by layer, the share of |dW|^2 that the adapter keeps.

    Raises:
        RuntimeError: PEFT's update of a layer is another one; or the logits differ by more than rounding, for which
            the measure is the difference that merging the same update makes in the same dtype. Over a quantised weight
            there is no such limit.
        ImportError: PEFT is not installed.
    """
    loaded = load_into_peft(remove_genft(frozen_copy(model)), directory)
    layers = adapted_layers(model)
    of_stacks = lora_names({path: layer for path, layer in layers.items() if isinstance(layer, ExpertUpdate)})
    for path, layer in layers.items():
        theirs = loaded.base_model.model.get_submodule(of_stacks.get(path, path)).get_delta_weight("default")
        error = relative(theirs.mT if layer.stored_transposed else theirs, layer.delta_weight())
        # PEFT rounds the update of stacked experts to their dtype.
        if error > max(1 - energy[path], 0) ** 0.5 + _UPDATE_TOLERANCE + torch.finfo(theirs.dtype).eps:
            raise RuntimeError(f"{path!r}: PEFT's update differs from the model's by {error:.1e} of its norm")
    expected = answer(model, inputs)
    drift = relative(answer(loaded, inputs), expected)
    if min(energy.values()) == 1 and quantised_layer(model) is None:  # such a layer's own product may round its inputs
        rounding = relative(answer(merge(frozen_copy(model)), inputs), expected)
        allowed = 4 * (rounding + torch.finfo(next(iter(layers.values())).weight.dtype).eps)
        if not drift <= allowed:
            raise RuntimeError(f"PEFT's logits differ by {drift:.1e}, more than rounding explains ({allowed:.1e})")
    return drift


def load_into_peft(model: nn.Module, directory: str | os.PathLike[str]) -> Any:
    """`model` as a `PeftModel` with the adapter in `directory`."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("to check an export it is loaded into PEFT: pip install peft") from error
    return PeftModel.from_pretrained(model, directory).eval()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors share the memory of the model's: to read, not to change in place.

    bitsandbytes' parameters, which are of classes of their own, know more than numbers, and forwards change it: these
    are copied.
    """
    shared: dict[int, Tensor] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    for parameter in model.parameters():
        if nn.Parameter not in type(parameter).__mro__[1:]:
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, shared).eval()


def quantised_layer(model: nn.Module) -> str | None:
    """The path of the first adapted layer over a quantised weight, if there is one."""
    layers = adapted_layers(model).items()
    return next((path for path, layer in layers if isinstance(layer.frozen_weight, FrozenWeight)), None)


@torch.no_grad()
def answer(model: nn.Module, inputs: Any) -> Tensor:
    """The logits, or whatever comes first, that `model` answers `inputs` with in evaluation."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    finally:
        for module, mode in training.items():
            module.training = mode
    output = getattr(output, "logits", output)
    return output if isinstance(output, Tensor) else output[0]


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, by Frobenius norms; infinite for anything beside zeros."""
    error = float(torch.linalg.vector_norm(actual.double() - expected.double()))
    return error and error / max(float(torch.linalg.vector_norm(expected.double())), 1e-300)
