"""A method, and what training needs to know of a model that one has adapted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from genft_kernels import parameter_groups
from genft_kernels.adapted_model import adapted_layers

from ..tasks.problem import Problem

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
