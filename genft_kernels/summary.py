"""How many parameters of an adapted model train, and where they are."""

from __future__ import annotations

from torch import nn

from .adapted_model import adapter_state, is_adapted, updates_of, warn_if_tied_again
from .parameter_groups import trained_tensors

_PARTS = ("generators", "specific", "modules_to_save", "other")


class TrainableSummary(dict[str, int]):
    """Numbers of parameters: "generators", "specific", "modules_to_save", "other", "trainable" and "total"."""

    def __str__(self) -> str:
        share = 100 * self["trainable"] / max(self["total"], 1)
        parts = ", ".join(f"{self[part]:,} {part}" for part in _PARTS if self[part])
        return f"trainable {self['trainable']:,} of {self['total']:,} parameters ({share:.3f} %): {parts}"


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """How many parameters of an adapted model train, and where they are.

    Raises:
        RuntimeError: the model has no adapter.
    """
    updates = updates_of(model)
    shared = {tensor for update in updates for tensor in trained_tensors(update.generator)}
    own = {parameter for update in updates for parameter in update.parameters()}
    saved: tuple[str, ...] = ()
    if is_adapted(model):  # PEFT's hold the modules to save in their own way
        saved = tuple(name + "." for name in adapter_state(model).saved_modules)
        warn_if_tied_again(model)
    summary = TrainableSummary(dict.fromkeys((*_PARTS, "trainable", "total"), 0))
    for name, parameter in model.named_parameters():
        summary["total"] += parameter.numel()
        if not parameter.requires_grad:
            continue
        if parameter in shared:
            part = "generators"
        elif parameter in own:
            part = "specific"
        else:
            part = "modules_to_save" if name.startswith(saved) else "other"
        summary[part] += parameter.numel()
        summary["trainable"] += parameter.numel()
    return summary
