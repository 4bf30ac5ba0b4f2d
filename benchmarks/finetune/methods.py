"""What is compared: every method freezes the model and returns it with its own part trainable."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from genft_kernels import GenFTConfig, apply_genft, parameter_groups
from genft_kernels.adapt import adapted_layers

from .encoder import HEAD, TARGETS

PLACES = {"target_modules": TARGETS, "modules_to_save": [HEAD]}
Adapt = Callable[[nn.Module], nn.Module]


def genft(preset: str, **overrides) -> Adapt:
    """GenFT with a preset of the package, changed by `overrides`."""
    return lambda model: apply_genft(model, GenFTConfig.preset(preset, **PLACES, **overrides))


def lora(model: nn.Module, rank: int) -> nn.Module:
    """PEFT LoRA on the same linears."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **PLACES))


def lora_as_large_as(other: Adapt) -> Adapt:
    """LoRA of the rank whose trainable size is nearest to that of `other`."""
    return lambda model: lora(model, nearest_rank(model, trainable_parameters(other(copy.deepcopy(model)))))


def linear_probe(model: nn.Module) -> nn.Module:
    """Only the head trains."""
    model.requires_grad_(False)
    model.get_submodule(HEAD).requires_grad_(True)
    return model


def nearest_rank(model: nn.Module, size: int) -> int:
    """The LoRA rank that comes nearest to `size` trainable parameters, head included."""
    head = sum(parameter.numel() for parameter in model.get_submodule(HEAD).parameters())
    targets = [module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    return max(1, round((size - head) / sum(module.in_features + module.out_features for module in targets)))


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers the optimizer will see."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def optimizer_groups(
    model: nn.Module, rate: float, head_rate: float | None, shared_lr_factor: float | None
) -> list[dict[str, Any]]:
    """What trains, the head at `head_rate`, which None makes the same; GenFT's as `parameter_groups` has it."""
    if adapted_layers(model):
        return parameter_groups(model, rate, head_lr=head_rate, shared_lr_factor=shared_lr_factor)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = f".{HEAD}." in f".{name}" and head_rate is not None
            groups.setdefault(head_rate if is_head else rate, []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def settings_of(model: nn.Module) -> dict:
    """The adapter's settings, for the record; empty where only the head trains."""
    if hasattr(model, "peft_config"):
        config = model.peft_config["default"]
        return {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    layers = adapted_layers(model)
    return next(iter(layers.values())).config.to_dict() if layers else {}


_fast = genft("fast")

# By name, a title and what adapts a TextClassifier.
METHODS = {
    "fast": ("GenFT fast (column stage)", _fast),
    "fast-both": ("GenFT fast-both (factored form)", genft("fast-both")),
    "tiled": ("GenFT fast-both, leaky_relu (tiled form)", genft("fast-both", outer_activation="leaky_relu")),
    "lora": ("PEFT LoRA", lora_as_large_as(_fast)),
    "lora-1": ("PEFT LoRA", partial(lora, rank=1)),
    "probe": ("linear probe", linear_probe),
    "fast-both-rms": ("GenFT fast-both, rho from the weights", genft("fast-both", weight_ratio="rms")),
    "glue": ("GenFT glue preset (tiled form)", genft("glue")),
}
DEFAULT_METHODS = ("fast", "lora", "probe")
