"""The head of a model: the part that a task needs and no pretraining has seen, as models of transformers and timm have.

Of a plain PyTorch model nobody can tell.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .arguments import warn

# By these names models of transformers hold what `from_pretrained` draws anew for a task.
NAMES = (
    "classifier", "classification_head", "cls_classifier", "distillation_classifier", "logits_proj", "pre_classifier",
    "projector", "qa_outputs", "score",
)  # fmt: skip


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the model's head by path; none where it has none, or it cannot be told."""
    of_timm = getattr(model, "get_classifier", None)
    if callable(of_timm):
        made = of_timm()
        found = made if isinstance(made, (tuple, list)) else (made,)
        return {name: module for name, module in model.named_modules() if any(module is each for each in found)}
    if not hasattr(getattr(model, "config", None), "model_type"):
        return {}
    return {name: module for name, module in model.named_children() if name in NAMES and list(module.parameters())}


def warn_of_fresh_heads(model: nn.Module) -> None:
    """Warn of a head that is frozen, and as it was drawn."""
    deviation = getattr(getattr(model, "config", None), "initializer_range", None)
    fresh = [
        name
        for name, head in heads(model).items()
        if not any(parameter.requires_grad for parameter in head.parameters())
        if any(isinstance(module, nn.Linear) and is_fresh(module, deviation) for module in head.modules())
    ]
    if fresh:
        warn(
            f"the head {', '.join(map(repr, fresh))} is as it was drawn, and stays frozen: modules_to_save='head' "
            f"trains it, or modules_to_save={fresh}"
        )


@torch.no_grad()
def is_fresh(linear: nn.Linear, deviation: float | None = None) -> bool:
    """Whether a layer's values look as nothing but an initialisation leaves them.

    Args:
        deviation: the standard deviation that the model draws its weights with, if it is known.
    """
    weight, bias = linear.weight, linear.bias
    if not weight.is_floating_point() or weight.is_meta:
        return False
    if bias is not None and not bias.is_meta and not bias.any():  # what is trained leaves no exact zeros
        return True
    bound = 1 / math.sqrt(weight.shape[1])
    as_pytorch = weight.abs().max() <= bound and _is_near(weight, bound / math.sqrt(3))
    return bool(as_pytorch or (bias is None and deviation is not None and _is_near(weight, deviation)))


def _is_near(weight: torch.Tensor, deviation: float) -> bool:
    """Whether the standard deviation of `weight` is this one, as far as so few values tell."""
    if weight.numel() < 2 or deviation <= 0:
        return False
    return abs(weight.float().std().item() / deviation - 1) < max(0.05, 3 / math.sqrt(2 * weight.numel()))
