"""`QuantisedGenFTLayer`: a `GenFTLayer` over a quantised base layer, which merges as PEFT's LoRA does for its kind."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...frozen_weight import FrozenWeight, is_kind_of_layer, kind_name, kind_of
from ...quantised_linear import updated_quantised
from ...targets import frozen_weight
from .layer import GenFTLayer


class QuantisedGenFTLayer(GenFTLayer):
    """A quantised layer with GenFT adapters, over the W that is made of its codes.

    Merged, W with the updates is quantised again, which rounds most of a small update away; the layer that was there
    is kept, and unmerging brings it back.

    Args:
        requantise: torchao's configuration anew, by a call, where the model knows it; else its kinds cannot merge.
    """

    base_layer: Any
    _unmerged: Any  # the base layer while another is merged; not registered

    def __init__(self, base_layer: nn.Module, shared: Any, requantise: Any = None) -> None:
        super().__init__(base_layer, shared)
        self._dense_dtype = frozen_weight(base_layer).dtype
        self._requantise = requantise
        self.__dict__["_unmerged"] = None

    @property
    def frozen_weight(self) -> FrozenWeight:  # type: ignore[override]
        return FrozenWeight(self._unmerged or self.base_layer, (self.out_features, self.in_features), self._dense_dtype)

    @property
    def stored_weight(self) -> Tensor:
        return self.frozen_weight.codes

    def train(self, mode: bool = True) -> QuantisedGenFTLayer:
        """As ever; but the base layer stays in training mode: in evaluation bitsandbytes' rounds scales (CPU)."""
        super().train(mode)
        self.base_layer.train()
        return self

    def cast_adapter(self, adapter_name: str, autocast: bool) -> None:
        """Make an adapter's tensors float32, or without `autocast` of the dense W's dtype."""
        dtype = torch.promote_types(self._dense_dtype, torch.float32) if autocast else self._dense_dtype
        for container in (self.genft_own, self.genft_shared):
            container[adapter_name].to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a layer in the base layer's place that holds W with the adapters' updates, quantised again.

        Raises:
            ValueError: `safe_merge`, and the merged weight would hold NaN or infinity; or a torchao model that was not
                loaded by transformers, which alone knows how it was quantised.
            NotImplementedError: a kind that is not of bitsandbytes, torchao or HQQ.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.genft_own]
        if not names:
            return
        frozen = self.frozen_weight
        merged = frozen.dense()
        for name in (*self.merged_adapters, *names):
            merged = merged + self.get_delta_weight(name)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        layer = _quantised_again(frozen.module, merged.to(frozen.dtype), self._requantise)
        self.__dict__["_unmerged"] = frozen.module
        self.base_layer = layer
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Bring the very base layer back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer = self._unmerged
        self.__dict__["_unmerged"] = None
        self.merged_adapters.clear()

    def _updated(self, x: Tensor, adapters: list[str]) -> Tensor:
        updates = [self.genft_own[name] for name in adapters if name in self.genft_own]
        if not updates:
            return self.base_layer.forward(x)
        return updated_quantised(x, self.frozen_weight, self.base_layer.bias, updates)

    def _apply(self, fn: Any, recurse: bool = True) -> GenFTLayer:
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            self._unmerged._apply(fn)
        return self


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
        f"Merge genft module to {bits}-bit linear may get different generations due to rounding errors.", stacklevel=4
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
