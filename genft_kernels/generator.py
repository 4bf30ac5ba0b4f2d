"""The layer-shared half of GenFT: one `GenFTGenerator` for all adapted layers of a weight shape."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from . import _torch_private
from .arguments import warn
from .checks import check_device, check_floating_dtype, check_layout, check_sizes
from .config import GenFTConfig, check_config
from .parameters import GeneratorParameters, shared_shapes
from .sharing.cache import LayerGroup
from .sharing.source import is_tensor_subclass


class GenFTGenerator(nn.Module):
    """The shared units and biases of both stages (docs/method.md#the-method).

    Parameters, by the names of `GeneratorParameters`: `column_down [s, in]`, `column_up [in, s]`,
    `row_down [s, out]`, `row_up [out, s]` and, with bias, `column_down_bias [k]`, `column_up_bias [in]`,
    `row_down_bias [k]`, `row_up_bias [out]`. What the configuration does not have is None.

    `group` is the `LayerGroup` of the layers that it serves.

    Args:
        in_features, out_features: the shape of the weights that it serves.
        config: the method's settings.
        device, dtype: of the parameters; the dtype defaults to PyTorch's default.

    Raises:
        ValueError: `delta_layout="out_in"` for a shape that is not square, or a dimension below 1.
        TypeError: `config` is not a `GenFTConfig`.
    """

    sharded = False
    # True: a state dict brought layers' own units but not these shared ones; False: it brought these, or was warned of;
    # None: nothing was loaded.
    left_out_of_load: bool | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: GenFTConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_config(config)
        check_layer_shape(in_features, out_features, config)
        check_device(device)
        check_floating_dtype("dtype", dtype)
        self.group = LayerGroup()
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        shapes = shared_shapes(config, in_features, out_features)
        for name in GeneratorParameters._fields:
            empty = torch.empty(shapes[name], device=device, dtype=dtype) if name in shapes else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.tensor_names = tuple(shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values: U(±1/sqrt(fan in)) or trunc_normal(0.02); where `zero_delta` says more, as it says."""
        zeroed = zeroed_names(self.config)
        for name, parameter in self.named_parameters():
            if name in zeroed:
                nn.init.zeros_(parameter)
            elif self.config.zero_delta == "down":
                draw_up(parameter)
            elif self.config.init_shared == "linear":
                fan_in = self.config.shared_dim if "_up" in name else self._stage_width(name)
                bound = 1 / math.sqrt(max(fan_in, 1))
                nn.init.uniform_(parameter, -bound, bound)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self) -> dict[str, torch.Tensor]:
        """The shared tensors by name. A call rather than attributes, so that hooks run: pruning's, offloading's."""
        if self.left_out_of_load:
            self._warn_of_load()
        return dict(zip(self.tensor_names, registered(self, self.tensor_names), strict=True))

    def tensors(self) -> Collection[torch.Tensor]:
        """The tensors that a call returns; read directly where no hook or override could tell the difference."""
        own = type(self) is not GenFTGenerator or "forward" in vars(self)
        before, after = _torch_private.global_hooks()
        if own or self._forward_pre_hooks or self._forward_hooks or before or after:
            return self().values()
        return registered(self, self.tensor_names)

    def stored(self) -> dict[str, torch.Tensor]:
        """The parameters by name, those among them that others are computed from: what optimizers step."""
        return dict(self.named_parameters())

    def _warn_of_load(self) -> None:
        """Once, that layers' own units were loaded without these."""
        self.left_out_of_load = False
        warn(
            f"units of layers of shape {self.in_features}x{self.out_features} were loaded from a state dict, but "
            "the generator that they share was not: it is not a part of the module that was saved or loaded. "
            "Register it there (part.genft_generators = model.genft_generators), so that it is saved and loaded"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(key.startswith(prefix) for key in state_dict):  # of one pruned or parametrized under other names
            self.left_out_of_load = False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, torch.Tensor):  # FSDP shards so, and in a forward the parameters are plain ones
            self.__dict__["sharded"] = self.sharded or is_tensor_subclass(value)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, shared_dim={config.shared_dim}, "
            f"bias={config.bias}, transform={config.transform!r}"
        )

    def _stage_width(self, name: str) -> int:
        return self.in_features if name.startswith("column") else self.out_features


class SharedTensors(nn.ModuleDict):
    """Shared tensors, on their model. In an `nn.Sequential`, which calls its children in turn, they change nothing.

    Generators by shape; of PEFT's tuner an `nn.ParameterDict` for each adapter.
    """

    def forward(self, x: Any) -> Any:
        return x


def registered(module: nn.Module, names: Sequence[str]) -> list[torch.Tensor]:
    """The tensors of `module` by these names: parameters without the detour of an attribute, computed ones with it."""
    try:
        return list(map(module._parameters.__getitem__, names))  # type: ignore[arg-type]
    except KeyError:
        return [getattr(module, name) for name in names]


def check_layer_shape(in_features: int, out_features: int, config: GenFTConfig) -> None:
    """Raise, or warn, where `config` does not suit layers of this shape."""
    check_sizes(in_features=in_features, out_features=out_features)
    check_layout(config, in_features, out_features)
    stages, doubled = (2, ", doubled by the sum,") if config.transform == "sum" else (1, "")
    if stages * config.hidden_dim > min(in_features, out_features):
        warn(
            f"k = shared_dim + specific_dim = {config.hidden_dim}{doubled} exceeds min(in, out) = "
            f"{min(in_features, out_features)}: the update is not low-rank"
        )
    tied_up_is_all = config.shared_dim == 0 and not config.bias and config.ties_specific(in_features, out_features)
    if config.zero_delta and tied_up_is_all:
        warn(
            "the specific units can never train: with shared_dim=0, tied specific units and zero_delta=True "
            "both stages start at zero; set tie_specific=False or zero_delta=False"
        )


def zeroed_names(config: GenFTConfig) -> frozenset[str]:
    """The tensors that start at zero by `zero_delta`: of the stages that make the update."""
    ends = {False: (), True: ("up", "up_bias"), "down": ("down", "down_bias", "up_bias")}[config.zero_delta]
    stages = {"both": ("row",), "sum": ("column", "row")}.get(config.transform, (config.transform,))
    return frozenset(f"{stage}_{end}" for stage in stages for end in ends)


def draw_up(parameter: torch.Tensor) -> None:
    """Draw an up matrix [n, units] from U(±1/sqrt(n)): the start of the half that does not start at zero."""
    bound = 1 / math.sqrt(parameter.shape[0])
    nn.init.uniform_(parameter, -bound, bound)
