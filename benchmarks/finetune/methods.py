"""What is compared: every method freezes the model and returns it with its own part trainable."""

import copy
from collections.abc import Callable

from torch import nn

from genft_kernels import GenFTConfig, apply_genft
from genft_kernels.adapt import adapted_layers

from .encoder import HEAD, TARGETS

PLACES = {"target_modules": TARGETS, "modules_to_save": [HEAD]}
Adapt = Callable[[nn.Module], nn.Module]


def genft(preset: str, **overrides) -> Adapt:
    """GenFT with a preset of the package, changed by `overrides`."""
    return lambda model: apply_genft(model, GenFTConfig.preset(preset, **PLACES, **overrides))


def lora_as_large_as(other: Adapt) -> Adapt:
    """PEFT LoRA on the same linears, of the rank whose trainable size is nearest to that of `other`."""

    def adapt(model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        rank = nearest_rank(model, trainable_parameters(other(copy.deepcopy(model))))
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **PLACES))

    return adapt


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
    "fast": ("GenFT fast (factored form)", _fast),
    "tiled": ("GenFT leaky_relu (tiled form)", genft("fast", outer_activation="leaky_relu")),
    "lora": ("PEFT LoRA", lora_as_large_as(_fast)),
    "probe": ("linear probe", linear_probe),
    "fast-rms": ("GenFT fast, rho from the weights", genft("fast", weight_ratio="rms")),
    "glue": ("GenFT glue preset (tiled form)", genft("glue")),
}
DEFAULT_METHODS = ("fast", "tiled", "lora", "probe")
