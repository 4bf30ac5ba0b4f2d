"""`GenFTExperts`: takes the place of a model's experts module, and computes it with generated updates."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..generator import GenFTGenerator
from ..instance_forward import carry_instance_forward, check_instance_forward, share_hooks
from ..merging import MarksMerged
from .interface import has_norm, projections
from .layout import Layout
from .products import expert_product
from .update import ExpertUpdate

STACKED = "_update"  # what the path of a stacked parameter's update has after the parameter's
# What a module shares with the one whose place it takes: a parameter that is rebound in one is rebound in the other.
_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def update_name(parameter_name: str) -> str:
    """The name of a parameter's update within its experts module."""
    return parameter_name + STACKED


class GenFTExperts(MarksMerged, nn.Module):
    """An experts module of transformers with updates beside its stacked parameters, which keep their names.

    Whatever implementation the model has chosen for its experts (`experts_implementation`), with an update the products
    are this package's. Without one, merged or disabled, the original answers as the model has it.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        check_instance_forward(original)
        share_hooks(original, self)
        self.__dict__.update({name: vars(original)[name] for name in _SHARED}, _original=original)
        self._modules = dict(original._modules)
        carry_instance_forward(original, self)
        self.training = original.training

    def adapt(self, name: str, layout: Layout, generator: GenFTGenerator, backend: str) -> ExpertUpdate:
        """Give the stacked parameter `name` an update."""
        update = ExpertUpdate(self, name, layout, generator, backend).train(self.training)
        self.add_module(update_name(name), update)
        return update

    @property
    def original(self) -> Any:
        """The module as it was, with the parameters as they are."""
        original = self.__dict__["_original"]
        original.training = self.training
        return original

    @property
    def updates(self) -> dict[str, ExpertUpdate]:
        """The updates of its parameters, by the parameters' names."""
        return {m.parameter_name: m for m in self._modules.values() if isinstance(m, ExpertUpdate)}

    @property
    def merged(self) -> bool:
        """Whether a parameter holds W + dW."""
        return any(update.merged for update in self.updates.values())

    def unmerge(self) -> None:
        """Give every merged parameter back the very W that it was."""
        for update in self.updates.values():
            if update.merged:
                update.unmerge()

    def release(self) -> nn.Module:
        """The original, to take its place again."""
        carry_instance_forward(self, self.original)
        return self.original

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        updates, original = self.updates, self.original
        if self.training and any(update.enabled and update.merged for update in updates.values()):
            raise RuntimeError("merged experts do not train: call unmerge() or eval() first")
        active = [update for update in updates.values() if update.active]
        specified = any(update.backend == "reference" for update in active)
        if active and not specified:
            return self._routed(hidden_states, top_k_index, top_k_weights)
        weights = {
            name: _materialised(update) if update.active else update.present_weight for name, update in updates.items()
        }
        module = _with(original, weights)
        # The class's, because a hook of accelerate's on the instance has run.
        return type(module).forward(module, hidden_states, top_k_index, top_k_weights)

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' own implementations: tokens in the order of their experts, two projections, and back."""
        original, (tokens, choices) = self.original, top_k_index.shape
        experts, order = top_k_index.reshape(-1).sort(stable=True)  # [S], S = tokens * choices
        count = next(iter(self.updates.values())).layout.experts
        # Experts beyond the last, as expert parallelism marks what is elsewhere, come after all others.
        bounds = torch.arange(count + 1, device=experts.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, bounds).cpu()  # [E + 1]
        x = hidden_states[order // choices]
        if "gate_up_proj" in projections(original):
            x = original._apply_gate(self._projection("gate_up_proj", x, offsets))
        else:
            x = original.act_fn(self._projection("up_proj", x, offsets))
        y = self._projection("down_proj", x, offsets)
        if has_norm(original):
            y = original.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return y[back].unflatten(0, (tokens, choices)).sum(1).to(hidden_states.dtype)

    def _projection(self, name: str, x: Tensor, offsets: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias") if self.original.has_bias else None
        update = self.updates.get(name)
        if update is not None and update.active:
            return update(x, offsets, bias)
        weight = getattr(self, name) if update is None else update.present_weight
        return expert_product(x, offsets, weight.mT if self.original.is_transposed else weight, bias)


def _materialised(update: ExpertUpdate) -> Tensor:
    """W + dW of all experts, by the specification."""
    delta = update.delta_weight(update.training)
    return (update.stored_weight.to(delta.dtype) + delta).to(update.stored_weight.dtype)


def _with(module: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    """The module with other tensors in the place of some parameters."""
    clone = copy.copy(module)
    clone.__dict__["_parameters"] = {**module._parameters, **weights}
    return clone
