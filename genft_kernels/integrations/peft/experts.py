"""`AdapterExperts`: an experts module within a PEFT model, whose stacked parameters have several adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...config import is_factored
from ...experts.layer import GenFTExperts, update_name
from ...experts.layout import Layout
from ...experts.products import expert_product
from ...experts.update import ExpertUpdate, updated_stack
from ...generator import GenFTGenerator, SharedTensors
from ...instance_forward import brought_back
from ...update import Factors
from .layer import AdapterLayer


class AdapterExperts(GenFTExperts):
    """Takes the place of an experts module; each adapted parameter has an `ExpertStack` with its adapters."""

    def stack(self, name: str, layout: Layout, shared: SharedTensors) -> ExpertStack:
        """That of the parameter `name`, made if it is not there."""
        if name not in self.updates:
            self.add_module(update_name(name), ExpertStack(self, name, layout, shared))
        return self.updates[name]

    @property
    def updates(self) -> dict[str, ExpertStack]:  # type: ignore[override]  # which answers as an ExpertUpdate does
        return {stack.parameter_name: stack for stack in self._modules.values() if isinstance(stack, ExpertStack)}


class StackUpdate(ExpertUpdate):
    """One adapter's own units for one stacked parameter, which knows the weight."""

    stack: ExpertStack

    def __init__(self, stack: ExpertStack, generator: GenFTGenerator) -> None:
        self.__dict__["stack"] = stack  # not registered: it is above
        super().__init__(stack.experts, stack.parameter_name, stack.layout, generator, "auto")

    @property
    def stored_weight(self) -> Tensor:
        return self.stack.stored_weight


class ExpertStack(AdapterLayer):
    """The adapters of one stacked parameter of experts. To `GenFTExperts` it is the parameter's update."""

    experts: AdapterExperts

    def __init__(self, experts: AdapterExperts, name: str, layout: Layout, shared: SharedTensors) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # not registered: it is above
        self.parameter_name, self.layout = name, layout
        self._hold(shared)
        self.train(experts.training)

    def update_layer(self, adapter_name: str, generator: GenFTGenerator) -> None:
        """Add an adapter."""
        self._add(adapter_name, StackUpdate(self, generator))

    @property
    def weight(self) -> Tensor:
        """The parameter; PEFT would look for it in a base layer."""
        return self.bound

    @property
    def bound(self) -> nn.Parameter:
        return getattr(self.experts, self.parameter_name)

    def _bind(self, holder: nn.Parameter) -> None:
        setattr(self.experts, self.parameter_name, holder)

    @property
    def present_weight(self) -> Tensor:
        """The weight of a product that has no update beside it: while merged and not disabled W + dW."""
        return self.bound if self.enabled else self.stored_weight

    @property
    def frozen_weight(self) -> Tensor:
        """All experts' W, one below the other; a matrix."""
        return self.stored_weight.flatten(0, -2)

    def _with_updates(self, adapters: Sequence[str]) -> Tensor:
        return updated_stack(self.layout, self.stored_weight, [self.genft_own[name] for name in adapters])

    @property
    def active_updates(self) -> list[StackUpdate]:
        """The updates of the active adapters."""
        return [self.genft_own[name] for name in self.active_adapters if name in self.genft_own]

    @property
    def active(self) -> bool:
        """Whether the projection takes updates beside its parameter."""
        return self.enabled and not self.merged and bool(self.active_updates)

    @property
    def enabled(self) -> bool:
        return not self.disable_adapters

    @property
    def backend(self) -> str:
        """Of the updates: "reference" if one asks for it, since that needs no products of ours."""
        return "reference" if any(update.backend == "reference" for update in self.active_updates) else "auto"

    def delta_weight(self, training: bool = False) -> Tensor:
        """The sum of the active updates as W is stored."""
        return torch.stack([update.delta_weight(training) for update in self.active_updates]).sum(0)

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
        """As `ExpertUpdate` has it, by the active updates."""
        updates = self.active_updates
        if len(updates) == 1:
            return updates[0](x, offsets, bias)
        if any(not is_factored(u.config.outer_activation, u.config.dropout * u.training) for u in updates):
            raise ValueError(
                f"{self.parameter_name}: several adapters of stacked experts act together in the factored form only: "
                "activate one at a time, or merge them"
            )
        with brought_back(*updates):
            made = [update.whole_factors(x) for update in updates]
        h = torch.cat([factors.h for factors, _, _ in made], -1)  # [E, in, k1 + k2 + ...]
        b = torch.cat([made[i][0].b * update.config.scaling for i, update in enumerate(updates)], -1)
        (_, _, stream), _, backend = made[0]
        matrices = self.layout.matrices(self.stored_weight)
        return expert_product(x, offsets, matrices, bias, Factors(h, b, stream), backend=backend)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts layers alone; `export_lora` writes experts, of a model that `apply_genft` has adapted."""
        return False
