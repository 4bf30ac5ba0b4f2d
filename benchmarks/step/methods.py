"""The ways to fine-tune a whole model, each with the plain weights that it stands for."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.layer.genft import official_linear
from benchmarks.measure.environment import version
from benchmarks.step.models import SEED, TARGETS
from genft_kernels import GenFTConfig, GenFTLinear, accumulate, apply_genft, reference
from genft_kernels.adapt import adapted_layers


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune a model.

    Args:
        name: unique among `METHODS`.
        title: as tables show it.
        adapt: gives a copy of a model what trains; with False, without dropout.
        plain_weights: by name, the weights with which the unadapted model computes the same, made of what trains.
        k: hidden units of an adapted layer; None where none is adapted.
        context: what a step's micro-batches run in.
        micro_batches: the least number of them that it is meant for.
        obstacle: why it cannot run, or None.
    """

    name: str
    title: str
    adapt: Callable[[nn.Module, bool], None]
    plain_weights: Callable[[nn.Module], dict[str, Tensor]]
    k: int | None = None
    context: Callable[[nn.Module], contextlib.AbstractContextManager] = contextlib.nullcontext
    micro_batches: int = 1
    obstacle: Callable[[], str | None] = lambda: None

    def build(self, base: nn.Module, dropout: bool = True) -> nn.Module:
        """`base` adapted. Frozen weights are shared with it; what trains is random, so that no gradient is zero."""
        shared = {} if self.k is None else {id(t): t for t in (*base.parameters(), *base.buffers())}
        model = copy.deepcopy(base, shared)
        self.adapt(model, dropout)
        if self.k is not None:
            device = next(base.parameters()).device
            generator = torch.Generator(device).manual_seed(SEED)
            with torch.no_grad():
                for parameter in trained(model).values():
                    parameter.normal_(std=0.02, generator=generator)
        return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- full fine-tuning and LoRA --------------------------------------------------------------------------------------


def _all_trains(model: nn.Module, dropout: bool) -> None:
    model.requires_grad_(True)


def _weights_themselves(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def _lora(model: nn.Module, dropout: bool, rank: int) -> None:
    """PEFT's, its adapters in the model's dtype, without dropout."""
    from peft import LoraConfig, inject_adapter_in_model

    dtype = next(model.parameters()).dtype
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), model)
    for parameter in trained(model).values():
        parameter.data = parameter.data.to(dtype)


def _lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + B A."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {
        f"{name}.weight": layer.get_base_layer().weight
        + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for name, layer in layers.items()
    }


def _peft_missing() -> str | None:
    return None if version("peft") else "PEFT is not installed (pip install peft)"


# --- GenFT ----------------------------------------------------------------------------------------------------------


def _genft(model: nn.Module, dropout: bool, preset: str) -> None:
    # Specific units that start at zero, as vtab's do, would not train; they cost the same.
    settings = {"init_specific_down": "kaiming_uniform", **({} if dropout else {"dropout": 0.0})}
    apply_genft(model, GenFTConfig.preset(preset, **settings))  # by default q and v, as in TARGETS


def _official(model: nn.Module, dropout: bool, preset: str) -> None:
    """The same parameters, but in W's dtype, and layers that materialise the update in every forward."""
    _genft(model, dropout, preset)
    for layer in adapted_layers(model).values():
        layer.forward = functools.partial(_official_forward, layer)
    dtype = layer.weight.dtype
    for parameter in trained(model).values():
        parameter.data = parameter.data.to(dtype)


def _official_forward(layer: GenFTLinear, x: Tensor) -> Tensor:
    return official_linear(x, layer.weight, layer.parameters_of_generator(), layer.config, bias=layer.bias)


def _genft_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + dW by the specification."""
    return {
        f"{name}.weight": layer.weight
        + reference.delta_weight(layer.weight, layer.parameters_of_generator(), layer.config)
        for name, layer in adapted_layers(model).items()
    }


# --- the registry ---------------------------------------------------------------------------------------------------


def _registry() -> list[Method]:
    ranks = {preset: GenFTConfig.preset(preset, init_specific_down="kaiming_uniform").hidden_dim for preset in _FORMS}
    methods = [Method("full", "full fine-tuning", _all_trains, _weights_themselves)]
    for k in ranks.values():
        adapt = functools.partial(_lora, rank=k)
        methods.append(Method(lora_of(k), f"PEFT LoRA, rank {k}", adapt, _lora_weights, k, obstacle=_peft_missing))
    for preset, form in _FORMS.items():
        adapt = functools.partial(_official, preset=preset)
        methods.append(Method(f"official-{preset}", f"official way, {form}", adapt, _genft_weights, ranks[preset]))
    for preset, form in _FORMS.items():
        adapt = functools.partial(_genft, preset=preset)
        methods.append(Method(f"genft-{preset}", f"GenFT, {form}", adapt, _genft_weights, ranks[preset]))
        methods.append(
            Method(
                f"genft-{preset}-accumulate", f"GenFT, {form}, accumulate", adapt, _genft_weights, ranks[preset],
                accumulate, 2,
            )
        )  # fmt: skip
    return methods


def lora_of(k: int) -> str:
    """The name of the LoRA of rank k."""
    return f"lora-{k}"


_FORMS = {"fast": "fast (factored)", "vtab": "vtab (tiled, dropout)"}
METHODS = {method.name: method for method in _registry()}
