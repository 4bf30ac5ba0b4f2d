"""`QuantisedGenFTLinear`: a `GenFTLinear` over a layer whose weight another library has quantised (QLoRA's place)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .arguments import about
from .checks import autocasts
from .frozen_weight import FrozenWeight, packed_tensors
from .instance_forward import brought_back, carry_instance_forward, share_hooks
from .modules import GenFTLinear
from .sharing.source import is_tensor_subclass
from .together import updated_linear
from .units import GenFTUpdate

Layer = TypeVar("Layer")


class QuantisedGenFTLinear(GenFTLinear):
    """A layer that keeps the quantised one whole, as `base_layer`: what is frozen is saved and moved as ever.

    `GenFTLinear.from_linear` makes it. It computes as `GenFTLinear` over the dequantised W would, which is made for an
    operation and dropped. `disabled` has the quantised layer answer itself.
    """

    base_layer: Any

    def _hold(self, linear: nn.Module) -> None:
        self.base_layer = linear
        frozen = FrozenWeight.of(linear)
        assert frozen is not None
        self._dense_shape, self._dense_dtype = tuple(frozen.shape), frozen.dtype

    def _freeze(self) -> None:
        self.base_layer.requires_grad_(False)

    @property
    def frozen_weight(self) -> FrozenWeight:
        """The handle of W [out, in]."""
        return FrozenWeight(self.base_layer, self._dense_shape, self._dense_dtype)

    @property
    def stored_weight(self) -> Tensor:
        return self.frozen_weight.codes

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """W as `base_layer` stores it."""
        return getattr(self.base_layer, "weight", self.stored_weight)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The bias of `base_layer`."""
        return self.base_layer.bias

    def train(self, mode: bool = True) -> QuantisedGenFTLinear:
        """As ever; but `base_layer` stays in training mode: in evaluation bitsandbytes' rounds scales (CPU)."""
        super().train(mode)
        self.base_layer.train()
        return self

    def reset_parameters(self) -> None:
        """Draw the layer's own units anew."""
        for update in self.updates.values():
            update.reset_specific_parameters()

    def merge(self) -> None:
        """RuntimeError: quantised again, W + dW would not be W + dW."""
        raise RuntimeError(f"its weight is {self._cannot_merge()}")

    def _cannot_merge(self) -> str:
        return (
            f"quantised ({self.frozen_weight.kind}) and takes in no update: "
            "remove_genft(model, keep_update=True, dequantize=True) leaves dense layers with W + dW"
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base_layer.forward(x)
        with brought_back(self.base_layer):
            return updated_quantised(x, self.frozen_weight, self.bias, list(self.updates.values()))

    def release(self) -> nn.Module:
        """The quantised layer."""
        carry_instance_forward(self, self.base_layer)
        return self.base_layer.train(self.training)

    @torch.no_grad()
    def made_dense(self, dtype: torch.dtype) -> nn.Linear:
        """A plain layer with W + dW in `dtype`, rounded once."""
        delta = self.delta_weight()
        weight = (self.frozen_weight.to(delta.dtype) + delta).to(dtype)
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), requires_grad=False)
        share_hooks(self, plain)
        carry_instance_forward(self, plain)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.frozen_weight.kind}"


def updated_quantised(x: Tensor, weight: FrozenWeight, bias: Tensor | None, updates: Sequence[GenFTUpdate]) -> Tensor:
    """`updated_linear` in the dtype in which the quantised layer computes, and from its input's and back to that."""
    if autocasts(x):
        return updated_linear(x, weight, bias, updates)
    dtype = weight.compute_dtype or x.dtype
    return updated_linear(x.to(dtype), weight, None if bias is None else bias.to(dtype), updates).to(x.dtype)


def check_stored(layer: nn.Module) -> None:
    """Raise ValueError if the layer's W is quantised, and what it is made of is no longer all there."""
    if isinstance(layer, QuantisedGenFTLinear):
        with about(layer.frozen_weight.kind):
            packed_tensors(layer.base_layer)


def mergeable_layers(layers: Mapping[str, Layer], *, leave_out: bool = False) -> list[Layer]:
    """The layers whose weight takes in an update; RuntimeError for others, unless they are to be left out."""
    for name, layer in layers.items():
        if isinstance(layer, QuantisedGenFTLinear) and not leave_out:
            raise RuntimeError(f"{name!r} is {layer._cannot_merge()}")
    return [layer for layer in layers.values() if not isinstance(layer, QuantisedGenFTLinear)]


def frozen_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first frozen floating-point parameter that is not quantised: what the model computes in."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not (parameter.requires_grad or is_tensor_subclass(parameter)):
            return parameter.dtype
    return torch.get_default_dtype()
