"""`ExpertUpdate`: the updates of one stacked parameter of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import backends, reference
from ..checks import check_linear, check_transforms, compute_dtype
from ..config import GenFTConfig, is_factored
from ..frozen_weight import FrozenWeight
from ..generator import GenFTGenerator
from ..merging import MergeableUpdate
from ..parameters import GeneratorParameters, for_blocks, of_block
from ..update import Action, Factors, forward_seed, generate_factors
from .layout import Layout
from .products import expert_product

if TYPE_CHECKING:
    from .layer import GenFTExperts


class ExpertUpdate(MergeableUpdate):
    """Every expert's own units beside the generator, for one projection whose weights are stacked in one parameter.

    Each expert is a layer to the generator, each half of gate and up a block of it. With `expert_specific="expert"` the
    units have a leading dimension E; with "layer" all experts share one set.

    Called with the experts' tokens, it is the projection: x [S, in] -> y [S, out].
    """

    experts: GenFTExperts  # whose parameter it is

    def __init__(self, experts: GenFTExperts, name: str, layout: Layout, generator: GenFTGenerator, backend: str):
        super().__init__()
        self.__dict__.update(experts=experts, generator=generator)  # not registered: they have owners
        self.parameter_name, self.layout = name, layout
        blocks = layout.experts * layout.halves
        rows = layout.experts * layout.out_features
        self.join(generator, backend, (layout.in_features, rows), (blocks, tuple(range(blocks))))

    def _shape_of_units(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return shape_of_units(self.config, self.layout, shape)

    @property
    def weight(self) -> Tensor:
        """The experts' parameter, which holds W + dW while merged."""
        return getattr(self.experts, self.parameter_name)

    @property
    def stored_weight(self) -> Tensor:
        return self.weight if self._unmerged is None else self._unmerged

    @property
    def present_weight(self) -> Tensor:
        """The weight of a product that has no update beside it: W, or W + dW while merged and not disabled."""
        return self.weight if self.enabled else self.stored_weight

    @property
    def frozen_weight(self) -> Tensor:
        """All experts' W as they are stored, one below the other, merged or not; a matrix."""
        return self.stored_weight.flatten(0, -2)

    def adapted_blocks(self) -> Sequence[Tensor | FrozenWeight]:
        """The halves of all experts, as `Layout.blocks` cuts them."""
        return self.layout.blocks(self.stored_weight)

    def parameters_of_generator(self) -> GeneratorParameters:
        """The tensors of every block: matrices have a leading dimension E * halves, biases none; differentiable."""
        blocks = self.blocks.count
        own = {name: for_blocks(units, blocks) for name, units in self.specific_parameters().items()}
        return GeneratorParameters.concatenated(self.shared_tensors(), own, self.stored_weight.device, blocks)

    def delta_weight(self, training: bool = False) -> Tensor:
        """dW as W is stored, generated from the frozen W, in float32 or wider; differentiable.

        Args:
            training: whether dropout is active.
        """
        return self.layout.matrices(torch.stack(list(self.deltas(training))))

    def deltas(self, training: bool = False) -> Iterator[Tensor]:
        """dW [out, in] of each expert."""
        layout, params = self.layout, self.parameters_of_generator()
        blocks = layout.blocks(self.stored_weight)
        for start in range(0, len(blocks), layout.halves):
            halves = []
            for index, block in enumerate(blocks[start : start + layout.halves], start):
                wide = block.to(torch.promote_types(block.dtype, torch.float32))
                halves.append(reference.delta_weight(wide, of_block(params, index), self.config, training=training))
            yield layout._replace(experts=1).join(torch.stack(halves))[0]

    @property
    def _place(self) -> tuple[nn.Module, str]:
        return self.experts, self.parameter_name

    def _updated_weight(self) -> Tensor:
        return updated_stack(self.layout, self.weight, [self])

    @property
    def active(self) -> bool:
        """Whether the projection takes an update beside its parameter."""
        return self.enabled and not self.merged

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
        """y [S, out] = x (W + dW)^T + bias, each row by its expert: e has rows `offsets[e]` to `offsets[e + 1]`."""
        factors, seed, backend = self.whole_factors(x)
        config = self.config
        action = Action(config.scaling, config.outer_activation, config.dropout if self.training else 0.0, seed)
        matrices = self.layout.matrices(self.stored_weight)
        return expert_product(x, offsets, matrices, bias, factors, action, backend)

    def whole_factors(self, x: Tensor) -> tuple[Factors, Tensor | None, str]:
        """The updates of the experts' whole matrices for tokens like x [S, in], each expert's seed, and the backend."""
        config, layout = self.config, self.layout
        check_linear(x, layout.matrices(self.stored_weight)[0], None)
        dtype = compute_dtype(x)
        dropout = config.dropout if self.training else 0.0
        psi = config.outer_activation
        backend = backends.checked_request(self.backend, x.device, dtype, not is_factored(psi, dropout))
        check_transforms(backend)
        # Drawn for every block, so that no two have one mask.
        seeds = None
        if forward_seed(None, x.device, self.training, dropout, psi, dtype) is not None:
            seeds = torch.randint(0, 2**63 - 1, (self.blocks.count,), dtype=torch.int64, device=x.device)
        factors = layout.join_factors(self._factors(dtype, backend, seeds), self.h_is_one)
        return factors, None if seeds is None else seeds[:: layout.halves], backend

    @property
    def h_is_one(self) -> bool:
        """Whether h is the same for the halves of an expert: it is the column stage's up matrix."""
        config = self.config
        return config.transform == "column" and (config.ratio_scope != "all" or config.weight_ratio != "rms")

    def _factors(self, dtype: torch.dtype, backend: str, seeds: Tensor | None) -> Factors:
        """h [E * halves, in, k] and b [E * halves, out / halves, k]; with those of other layers where that can be."""
        if self.generates_alone():
            dropout = self.config.dropout if self.training else 0.0
            return generate_factors(
                self.adapted_blocks(), self.parameters_of_generator(), self.config, dtype=dtype, dropout=dropout,
                seed=seeds, backend=backend,
            )  # fmt: skip
        each = [None] * self.blocks.count if seeds is None else list(seeds.split(1))
        found = self.generator.group.factors_for(self, dtype, backend, each)  # type: ignore[arg-type]
        h, b = (torch.stack([getattr(factors, name) for factors in found]) for name in ("h", "b"))
        return Factors(h, b, found[0].stream)

    def extra_repr(self) -> str:
        config = self.config
        parts = [
            f"{self.layout.experts} experts of {self.layout.in_features} x {self.layout.out_features}",
            f"shared_dim={config.shared_dim}, specific_dim={config.specific_dim}",
            f"backend={self.backend!r}",
            "merged" if self.merged else "",
        ]
        return ", ".join(part for part in parts if part)


def updated_stack(layout: Layout, stored: Tensor, updates: Sequence[ExpertUpdate]) -> Tensor:
    """W with some updates of it, as W is stored, in its dtype."""
    updated = torch.empty_like(stored)
    deltas = (update.deltas() for update in updates)
    matrices = layout.matrices(stored), layout.matrices(updated)
    for matrix, out, *of_expert in zip(*matrices, *deltas, strict=True):  # a float32 stack would be large
        out.copy_(matrix.to(of_expert[0].dtype) + sum(of_expert))
    return updated


def shape_of_units(config: GenFTConfig, layout: Layout, shape: tuple[int, int]) -> tuple[int, ...]:
    """That of a tensor of own units, whose shape in a layer is `shape`."""
    return shape if config.expert_specific == "layer" else (layout.experts, *shape)
