"""The methods that are compared: each freezes a model and returns it with its own part trainable."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from genft_kernels import GenFTConfig, apply_genft, parameter_groups
from genft_kernels.adapted_model import adapted_layers

from .tasks.problem import Places, Problem

MOST_VERA_UNITS = 1024  # its vectors are short: a budget would pay for more than are of use
# The model, its problem, the number of parameters beside the head, and the factor on the update's own scale.
Adapt = Callable[[nn.Module, Problem, int, float], nn.Module]


class Unsuitable(Exception):
    """A model has nothing that a method could train."""


@dataclass(frozen=True)
class Method:
    """How a model is adapted, and around which rates a sweep tries it."""

    title: str
    adapt: Adapt
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)  # at the scale 1
    scales: tuple[float, ...] = (1.0, 0.25)  # a smaller one is tried with rates as many times larger
    sized: bool = True  # whether it can be made larger and smaller
    needs_head: bool = False  # whether nothing else trains


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers the optimizer will see."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def optimizer_groups(
    model: nn.Module, head: str | None, rate: float, head_rate: float | None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups, the head's at `head_rate`, which None makes the same; GenFT's as `parameter_groups` has it."""
    if adapted_layers(model):
        return parameter_groups(model, rate, head_lr=head_rate, weight_decay=weight_decay)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = head is not None and f".{head}." in f".{name}" and head_rate is not None
            groups.setdefault(head_rate if is_head else rate, []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The adapter's settings, for the record; empty where there is none."""
    if hasattr(model, "peft_config"):
        config = model.peft_config["default"]
        names = ("peft_type", "r", "lora_alpha", "d_initial", "n_frequency", "scaling")
        return {name: getattr(config, name) for name in names if hasattr(config, name)}
    layers = adapted_layers(model)
    return next(iter(layers.values())).config.to_dict() if layers else {}


# --- GenFT with this package's presets, sized to the budget, and with the official one of the domain ----------------


def sized(preset: str, **overrides: Any) -> Adapt:
    """A preset with as many units as the budget pays for."""

    def adapt(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
        scaling = scale * GenFTConfig.preset(preset).scaling
        places = problem.places.of_config()
        config = GenFTConfig.for_budget(model, size, preset=preset, scaling=scaling, **places, **overrides)
        return apply_genft(model, config)

    return adapt


def of_one_kind(units: str) -> Adapt:
    """`fast` with units of one kind: `units` is "shared_dim" or "specific_dim"."""

    def adapt(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
        none = {"shared_dim": 0, "specific_dim": 0}
        widths = [(linear.in_features, linear.out_features) for linear in problem.places.linears(model)]
        paid = set(widths) if units == "shared_dim" else widths  # shared ones once a shape
        a_unit = sum(2 * in_features for in_features, _ in paid)  # its down and up
        scaling = scale * GenFTConfig.preset("fast").scaling
        sizes = none | {units: max(1, size // a_unit), "scaling": scaling}
        return apply_genft(model, GenFTConfig.preset("fast", **sizes, **problem.places.of_config()))

    return adapt


def official(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """The official preset of the problem's domain, whatever the budget, in its layout where weights are square."""
    preset = GenFTConfig.preset(problem.official, **problem.places.of_config())
    square = all(linear.in_features == linear.out_features for linear in problem.places.linears(model))
    layout = preset.delta_layout if square else "in_out"
    return apply_genft(model, dataclasses.replace(preset, scaling=scale * preset.scaling, delta_layout=layout))


# --- the methods that come with PEFT, on the same linears -----------------------------------------------------------


def lora(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """LoRA of the rank whose size is nearest to the budget, alpha twice the rank times `scale`."""
    from peft import LoraConfig

    rank = nearest_rank(model, problem.places, size)
    return _peft(model, problem.places, LoraConfig, r=rank, lora_alpha=2 * rank * scale, lora_dropout=0.0)


def vera(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """VeRA: one vector of the rank and one of the output's length for each linear."""
    from peft import VeraConfig

    layers = problem.places.linears(model)
    rank = round(size / len(layers)) - max(layer.out_features for layer in layers)
    return _peft(model, problem.places, VeraConfig, r=min(max(1, rank), MOST_VERA_UNITS), d_initial=0.1 * scale)


def fourierft(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """FourierFT: the same number of frequencies for each linear."""
    from peft import FourierFTConfig

    layers = problem.places.linears(model)
    most = min(layer.weight.numel() for layer in layers)
    return _peft(
        model, problem.places, FourierFTConfig, n_frequency=min(size // len(layers), most), scaling=150.0 * scale
    )


def nearest_rank(model: nn.Module, places: Places, size: int) -> int:
    """The LoRA rank that comes nearest to `size` parameters."""
    a_rank = sum(module.in_features + module.out_features for module in places.linears(model))
    return max(1, round(size / a_rank))


def _peft(model: nn.Module, places: Places, config: Any, **settings: Any) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(model, config(**settings, **places.of_config()))


# --- the methods that need no adapter -------------------------------------------------------------------------------


def bitfit(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """Every bias and the head train."""
    if not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise Unsuitable("the model has no biases")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    return _with_head(model, problem)


def linear_probe(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """Only the head trains."""
    return _with_head(model.requires_grad_(False), problem)


def _with_head(model: nn.Module, problem: Problem) -> nn.Module:
    if problem.places.head:
        model.get_submodule(problem.places.head).requires_grad_(True)
    return model


def _doubled(count: int) -> tuple[float, ...]:
    """So many rates."""
    return tuple(5e-4 * 2**step for step in range(count))


METHODS: dict[str, Method] = {
    "fast": Method("GenFT fast (column stage)", sized("fast")),
    "lora": Method("PEFT LoRA", lora),
    "own": Method("GenFT fast, no shared units (column stage)", of_one_kind("specific_dim")),
    "shared": Method("GenFT fast, shared units alone (column stage)", of_one_kind("shared_dim")),
    "wegeft": Method("GenFT wegeft (column stage, all units shared)", sized("wegeft")),
    "row": Method("GenFT row stage, as fast", sized("fast", transform="row")),
    "fast-sum": Method("GenFT fast-sum (column and row stage side by side)", sized("fast-sum")),
    "fast-both": Method("GenFT fast-both (factored form)", sized("fast-both")),
    "tiled": Method("GenFT fast-both, leaky_relu (tiled form)", sized("fast-both", outer_activation="leaky_relu")),
    "official": Method("GenFT, official preset", official, rates=(2.5e-3, 5e-3, 1e-2), sized=False),
    "vera": Method("PEFT VeRA", vera, rates=(5e-3, 1e-2, 2e-2)),
    "fourierft": Method("PEFT FourierFT", fourierft, rates=(1e-2, 2e-2, 4e-2)),
    "bitfit": Method("BitFit", bitfit, _doubled(6), scales=(1.0,), sized=False),
    "probe": Method("linear probe", linear_probe, _doubled(12), scales=(1.0,), sized=False, needs_head=True),
}  # fmt: skip
