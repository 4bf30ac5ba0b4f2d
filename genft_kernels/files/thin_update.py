"""Updates as LoRA has them: two thin matrices, exact in the factored form (docs/method.md#factored-form)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..parameters import as_group
from ..units import GenFTUpdate
from ..update import generate_factors


class ThinUpdate(NamedTuple):
    """A layer's update: dW = up down."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    energy: float  # the share of |dW|^2 that it keeps

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def truncated(self, rank: int | None, energy: float | None) -> ThinUpdate:
        """Itself, or its largest singular values where `rank` or `energy` allow less."""
        if energy is None and (rank is None or self.rank <= rank):
            return self
        left, upper = torch.linalg.qr(self.up)
        right, lower = torch.linalg.qr(self.down.mT)
        inner, values, outer = torch.linalg.svd(upper @ lower.mT)
        return largest((left @ inner, values, outer @ right.mT), rank, energy)

    def padded(self, rank: int) -> ThinUpdate:
        """The same with units of zeros, up to `rank`."""
        missing = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(missing, self.down.shape[1])])
        return ThinUpdate(down, torch.cat([self.up, self.up.new_zeros(self.up.shape[0], missing)], 1), self.energy)


@torch.no_grad()
def exact(updates: Iterable[GenFTUpdate]) -> ThinUpdate:
    """The factored updates of one layer: those of each adapted block side by side, zero outside of the block's rows."""
    downs, ups = zip(*(_factors(update) for update in updates), strict=True)
    return ThinUpdate(torch.cat(downs), torch.cat(ups, 1), 1.0)


def _factors(update: GenFTUpdate) -> tuple[Tensor, Tensor]:
    """(down, up) of the blocks that one generator serves."""
    config, dtype = update.config, torch.promote_types(update.frozen_weight.dtype, torch.float32)
    params = as_group(update.parameters_of_generator())
    downs, ups = [], []
    for index, weight in zip(update.blocks.adapted, update.adapted_blocks(), strict=True):
        generated = generate_factors([weight], params, config, dtype=dtype, dropout=0.0, seed=None, backend="eager")
        (factors,) = generated.unbind()
        up = factors.b.new_zeros(update.frozen_weight.shape[0], factors.b.shape[1])  # [out, k]
        update.blocks.split(up)[index].copy_(config.scaling * factors.b)
        downs.append(factors.h.mT)
        ups.append(up)
    return torch.cat(downs), torch.cat(ups, 1)


def largest(decomposed: tuple[Tensor, ...], rank: int | None, energy: float | None) -> ThinUpdate:
    """The largest singular values of (left vectors [out, m], values [m], right vectors [m, in])."""
    left, values, right = decomposed
    total = values.double().square().sum()
    # Of an update of zeros everything is kept.
    kept = values.double().square().cumsum(0) / total if total > 0 else torch.ones_like(values)
    count = rank or int((kept < (energy or 1.0)).sum()) + 1
    count = min(count, len(values))
    roots = values[:count].sqrt()
    return ThinUpdate(roots[:, None] * right[:count], left[:, :count] * roots, kept[count - 1].item())
