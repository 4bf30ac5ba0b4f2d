"""`GenFTLayer`: a frozen linear layer within a PEFT model, with one update for each of its adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...adaptable import check_adaptable, is_conv1d
from ...frozen_weight import FrozenWeight, kind_name, kind_of
from ...generator import GenFTGenerator, SharedTensors, registered
from ...instance_forward import brought_back, share_hooks
from ...modules import UpdateOfLayer
from ...row_blocks import RowBlocks
from ...sharing.source import is_tensor_subclass
from ...targets import weight_of
from ...together import updated_linear
from ...units import GenFTUpdate, adapter_dtype

BASE = "__base__"  # PEFT's name for the model without an adapter
PLAIN = {Tensor, nn.Parameter}  # `is_tensor_subclass` of many at once
SHARED = "genft_shared"  # the name of the shared tensors in the model


class StoredGenerator(GenFTGenerator):
    """A generator whose tensors are in a container of PEFT's, `{in}x{out}_{name}` each.

    PEFT takes an adapter's name out of a key only beside the key's last part, so a tensor's key ends right after it.
    """

    container: nn.ParameterDict

    def __init__(
        self, shape: tuple[int, int], config: Any, container: nn.ParameterDict, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(*shape, config, dtype=dtype)
        self._stored = tuple(f"{self.in_features}x{self.out_features}_{name}" for name in self.tensor_names)
        for name, key in zip(self.tensor_names, self._stored, strict=True):
            container[key] = self._parameters.pop(name)
        self.__dict__["container"] = container  # not registered: the model has it

    def forward(self) -> dict[str, Tensor]:
        with brought_back(self.container):
            return dict(zip(self.tensor_names, self.tensors(), strict=True))

    def tensors(self) -> list[Tensor]:
        return registered(self.container, self._stored)

    def stored(self) -> dict[str, Tensor]:
        return dict(zip(self.tensor_names, self.tensors(), strict=True))

    @property
    def sharded(self) -> bool:  # type: ignore[override]  # of what the container holds now
        return not PLAIN.issuperset(map(type, self.tensors()))


class AdapterUpdate(UpdateOfLayer):
    """One adapter's own units in one layer."""

    def extra_repr(self) -> str:
        return f"shared_dim={self.config.shared_dim}, specific_dim={self.config.specific_dim}"


class AdapterLayer(nn.Module, BaseTunerLayer):
    """Adapters' units over one frozen weight."""

    # The adapters' units here, and what the model holds for all layers: PEFT switches both on and off.
    adapter_layer_names = ("genft_own", "genft_shared")
    other_param_names = ()

    genft_own: Any  # an nn.ModuleDict of updates, by the adapters' names
    genft_shared: SharedTensors
    # PEFT's, which tells type checkers nothing.
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[..., Tensor]

    def _hold(self, shared: SharedTensors) -> None:
        """Begin with no adapter."""
        self.genft_own = nn.ModuleDict()
        self.__dict__["genft_shared"] = shared  # not registered: one key in a state dict, and it is the model's
        self._frozen: dict[str, Any] = {}  # what `bound` was, while merged; a dict, so that it is not registered
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def frozen_weight(self) -> Tensor | FrozenWeight:
        """W as a matrix, merged or not."""
        raise NotImplementedError

    @property
    def bound(self) -> Any:
        """The parameter that holds W, or W + dW while merged."""
        raise NotImplementedError

    def _bind(self, holder: Any) -> None:
        """Make `holder` the present one."""
        raise NotImplementedError

    def _holder(self, weight: Tensor) -> Any:
        """One of another W, as W is stored."""
        return nn.Parameter(weight.to(self.stored_weight.dtype).contiguous(), requires_grad=False)

    def _with_updates(self, adapters: Sequence[str]) -> Tensor:
        """W with these adapters' updates, stored as W is; of its dtype or a wider one."""
        raise NotImplementedError

    @property
    def stored_weight(self) -> Tensor:
        """W as the base layer stores it, merged or not."""
        return self._frozen["weight"] if self._frozen else self.bound

    def _add(self, adapter_name: str, update: GenFTUpdate) -> None:
        self.genft_own[adapter_name] = update.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's also casts to the base layer's dtype, which would round what was just loaded."""
        for container in (self.genft_own, self.genft_shared):
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device or self.stored_weight.device)

    def cast_adapter(self, adapter_name: str, autocast: bool) -> None:
        """Make an adapter's tensors float32 over a 16-bit W, or without `autocast` of W's dtype."""
        dtype = self.frozen_weight.dtype
        for container in (self.genft_own, self.genft_shared):
            container[adapter_name].to(adapter_dtype(dtype) if autocast else dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Rebind W to itself with the adapters' updates, rounded once; what was there is kept.

        Raises:
            ValueError: `safe_merge`, and the merged weight would hold NaN or infinity; or as `_holder`.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.genft_own]
        if not names:
            return
        merged = self._with_updates([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        holder = self._holder(merged)
        self._frozen.setdefault("weight", self.bound)
        self._bind(holder)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Bring back the very W that was there."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._bind(self._frozen.pop("weight"))
        self.merged_adapters.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for frozen in self._frozen.values():  # not registered, so it is moved by hand
            if isinstance(frozen, nn.Module):
                frozen._apply(fn)
            else:
                frozen.data = fn(frozen.data)
        return self


class GenFTLayer(AdapterLayer):
    """A frozen `nn.Linear` or transformers `Conv1D` with GenFT adapters.

    Raises:
        TypeError, ValueError: the layer cannot be adapted; the message says why.
    """

    base_layer: Any  # an nn.Linear or a Conv1D

    def __init__(self, base_layer: nn.Module, shared: SharedTensors) -> None:
        super().__init__()
        check_adaptable(base_layer)
        share_hooks(base_layer, self)  # its forward is called, never itself
        self.base_layer = base_layer
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.out_features, self.in_features = weight_of(base_layer).shape
        self._hold(shared)
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, generator: GenFTGenerator, blocks: RowBlocks | None = None) -> None:
        """Add an adapter."""
        self._add(adapter_name, AdapterUpdate(self, generator, "auto", blocks))

    @property
    def bound(self) -> Any:
        return self.base_layer.weight

    @property
    def stored_weight(self) -> Tensor:
        """W as the base layer stores it, merged or not."""
        if self._frozen:
            return self._frozen["weight"]
        base: Any = self._modules["base_layer"]  # asked several times a forward: without the detour of attributes
        weight = base._parameters.get("weight")
        return base.weight if weight is None else weight

    def _bind(self, holder: Any) -> None:
        self.base_layer.weight = holder

    @property
    def frozen_weight(self) -> Tensor:
        return self.stored_weight.t() if self.fan_in_fan_out else self.stored_weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW in the orientation in which W is stored, without dropout."""
        delta = self.genft_own[adapter].delta_weight()
        return delta.t() if self.fan_in_fan_out else delta

    def _with_updates(self, adapters: Sequence[str]) -> Tensor:
        return sum(map(self.get_delta_weight, adapters), self.stored_weight)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer.forward(x, *args, **kwargs)
        return self._updated(x, self.active_adapters)

    def _updated(self, x: Tensor, adapters: list[str]) -> Tensor:
        own: Any = self._modules["genft_own"]._modules  # type: ignore[union-attr]
        updates = [own[name] for name in adapters if name in own]
        if not updates:
            return self.base_layer.forward(x)
        if "_hf_hook" in vars(self.base_layer):
            with brought_back(self.base_layer, *updates):
                return self._product(x, updates)
        return self._product(x, updates)

    def _product(self, x: Tensor, updates: list[AdapterUpdate]) -> Tensor:
        weight = self.frozen_weight
        if is_tensor_subclass(weight) and kind_of(self.base_layer) is not None:
            raise TypeError(f"{kind_name(self.base_layer)} was quantised after its adapter: quantise the model first")
        # FSDP's say that they train, because others do that it keeps them with.
        if weight.requires_grad and not torch.is_grad_enabled():
            weight = weight.detach()
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, weight.dtype)
        return updated_linear(x, weight, self.base_layer.bias, updates)

    def _mixed(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        """A batch whose samples [batch, ...] have an adapter each, `__base__` for none."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if self.disable_adapters:
            return self.base_layer.forward(x)
        places, outputs = [], []
        for name in dict.fromkeys(adapter_names):
            samples = [index for index, wanted in enumerate(adapter_names) if wanted == name]
            places += samples
            outputs.append(self._updated(x[samples], [name]))
        order = torch.tensor(places, device=x.device).argsort()
        return torch.cat(outputs)[order]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is an addition to W (genft_kernels/integrations/peft/replaced.py)."""
        return True

    def __repr__(self) -> str:
        return "genft." + super().__repr__()
