"""How many parameters of an adapted model train, and where they are."""

from __future__ import annotations

from torch import nn

from .adapted_model import (
    GENERATORS,
    adapted_layers,
    adapter_state,
    is_adapted,
    updates_of,
    warn_if_tied_again,
)


class TrainableSummary(dict[str, int]):
    """Numbers of parameters: "generators", "specific", "modules_to_save", "other", "trainable" and "total"."""

    def __str__(self) -> str:
        share = 100 * self["trainable"] / max(self["total"], 1)
        parts = ", ".join(
            f"{self[part]:,} {part}" for part in ("generators", "specific", "modules_to_save", "other") if self[part]
        )
        return f"trainable {self['trainable']:,} of {self['total']:,} parameters ({share:.3f} %): {parts}"


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """How many parameters of an adapted model train, and where they are.

    Raises:
        RuntimeError: the model has no adapter.
    """
    updates = updates_of(model)
    saved: tuple[str, ...] = ()
    layers = tuple(name + "." for name in adapted_layers(model))
    # Of a model of PEFT's, which have other names and hold the modules to save in their own way.
    shared = {tensor for update in updates for tensor in update.generator().values()}
    own = {tensor for update in updates for tensor in update.specific_parameters().values()}
    if is_adapted(model):
        saved = tuple(name + "." for name in adapter_state(model).saved_modules)
        warn_if_tied_again(model)
    parts = ("generators", "specific", "modules_to_save", "other", "trainable", "total")
    summary = TrainableSummary(dict.fromkeys(parts, 0))
    for name, parameter in model.named_parameters():
        summary["total"] += parameter.numel()
        if not parameter.requires_grad:
            continue
        summary["trainable"] += parameter.numel()
        if name.startswith(GENERATORS + ".") or parameter in shared:
            summary["generators"] += parameter.numel()
        elif name.startswith(layers) or parameter in own:
            summary["specific"] += parameter.numel()
        elif saved and name.startswith(saved):
            summary["modules_to_save"] += parameter.numel()
        else:
            summary["other"] += parameter.numel()
    return summary
