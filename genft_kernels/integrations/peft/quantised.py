"""`QuantisedGenFTLayer`: a `GenFTLayer` over a quantised base layer, which merges as PEFT's LoRA does for its kind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...frozen_weight import FrozenWeight, is_kind_of_layer, kind_name, kind_of
from ...quantised_linear import updated_quantised
from ...targets import weight_of
from .layer import AdapterUpdate, GenFTLayer


class QuantisedGenFTLayer(GenFTLayer):
    """A quantised layer with GenFT adapters, over the W that is made of its codes.

    Merged, W with the updates is quantised again, which rounds most of a small update away; the layer that was there
    is kept, and unmerging brings it back.

    Args:
        requantise: torchao's configuration anew, by a call, where the model knows it; else its kinds cannot merge.
    """

    def __init__(self, base_layer: nn.Module, shared: Any, requantise: Any = None) -> None:
        super().__init__(base_layer, shared)
        self._dense_dtype = weight_of(base_layer).dtype
        self._requantise = requantise

    @property
    def frozen_weight(self) -> FrozenWeight:  # type: ignore[override]
        module = self._frozen.get("weight", self.base_layer)
        return FrozenWeight(module, (self.out_features, self.in_features), self._dense_dtype)

    @property
    def stored_weight(self) -> Tensor:
        return self.frozen_weight.codes

    def train(self, mode: bool = True) -> QuantisedGenFTLayer:
        """As ever; but the base layer stays in training mode: in evaluation bitsandbytes' rounds scales (CPU)."""
        super().train(mode)
        self.base_layer.train()
        return self

    @property
    def bound(self) -> Any:
        """The base layer, or while merged another in its place."""
        return self.base_layer

    def _bind(self, holder: Any) -> None:
        self.base_layer = holder

    def _holder(self, weight: Tensor) -> nn.Module:
        """A layer over another W, quantised again.

        Raises:
            ValueError: a torchao model that was not loaded by transformers, which alone knows how it was quantised.
            NotImplementedError: a kind that is not of bitsandbytes, torchao or HQQ.
        """
        frozen = self.frozen_weight
        return _quantised_again(frozen.module, weight.to(frozen.dtype), self._requantise)

    def _with_updates(self, adapters: Sequence[str]) -> Tensor:
        return sum(map(self.get_delta_weight, adapters), self.frozen_weight.dense())

    def _product(self, x: Tensor, updates: list[AdapterUpdate]) -> Tensor:
        return updated_quantised(x, self.frozen_weight, self.base_layer.bias, updates)


def layer_over(target: nn.Module, shared: Any, model: nn.Module) -> GenFTLayer:
    """A `GenFTLayer` over a layer of a model, of the class that suits it."""
    if kind_of(target) is None:
        return GenFTLayer(target, shared)
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return QuantisedGenFTLayer(target, shared, getattr(config, "get_apply_tensor_subclass", None))


def _quantised_again(base: Any, weight: Tensor, requantise: Any) -> nn.Module:
    """A layer like `base` over another W [out, in]."""
    name = kind_name(base)
    library = (type(base) if is_kind_of_layer(base) else type(base.weight)).__module__.partition(".")[0]
    if library == "hqq":
        return _hqq(base, weight)
    layer = copy.copy(base)
    layer._parameters = dict(base._parameters)
    if library == "bitsandbytes":
        _put_bitsandbytes(layer, weight)
    elif library == "torchao":
        if requantise is None:
            raise ValueError(
                f"{name} cannot be merged: how it was quantised is known only of models that transformers loads with a "
                "TorchAoConfig"
            )
        from torchao import quantize_

        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(layer, requantise())
    else:
        raise NotImplementedError(f"{name} cannot be merged: how W is quantised again is not known")
    return layer


def _put_bitsandbytes(layer: Any, weight: Tensor) -> None:
    import bitsandbytes as bnb

    before = layer.weight
    bits = 4 if isinstance(layer, bnb.nn.Linear4bit) else 8
    warnings.warn(
        f"Merge genft module to {bits}-bit linear may get different generations due to rounding errors.", stacklevel=5
    )
    if bits == 4:
        kept = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(before, name) for name in kept}
        layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, **settings).to(before.device)
        layer.quant_state = layer.weight.quant_state
    else:
        layer.state = copy.copy(layer.state)
        layer.state.reset_grads()
        layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(before.device)


def _hqq(base: Any, weight: Tensor) -> nn.Module:
    settings = {**copy.deepcopy(base.quant_config), "offload_meta": base.offload_meta}
    layer = type(base)(None, settings, compute_dtype=base.compute_dtype, device=base.device)
    settings.pop("offload_meta")
    layer.quantize(weight, **settings)
    layer.bias = base.bias
    return layer
