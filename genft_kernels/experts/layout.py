"""How the experts of one projection lie in one stacked tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..update import Factors


class Layout(NamedTuple):
    """E matrices [out, in] in one tensor; gate and up, where they are one projection, are two blocks of rows."""

    experts: int  # E
    out_features: int
    in_features: int
    halves: int = 1  # 2 for gate and up
    interleaved: bool = False  # rows of gate and up alternate, instead of one half after the other
    transposed: bool = False  # the tensor is [E, in, out] instead of [E, out, in]

    @property
    def block_shape(self) -> tuple[int, int]:
        """(in, out) of a block, which is a layer to the generator."""
        return self.in_features, self.out_features // self.halves

    def matrices(self, stored: Tensor) -> Tensor:
        """[E, out, in], and its own inverse; a view."""
        return stored.mT if self.transposed else stored

    def blocks(self, stored: Tensor) -> list[Tensor]:
        """The halves of the first expert, then those of the second, ...; each [out / halves, in]; views."""
        return [half for expert in self._halves(self.matrices(stored)).unbind(0) for half in expert.unbind(0)]

    def join(self, blocks: Tensor) -> Tensor:
        """Rows [E, out, n] of such blocks [E * halves, out / halves, n]."""
        halves = blocks.unflatten(0, (self.experts, self.halves))
        return (halves.transpose(1, 2) if self.interleaved else halves).flatten(1, 2)

    def join_factors(self, factors: Factors, h_is_one: bool) -> Factors:
        """h [E, in, K] and b [E, out, K] of the experts' whole matrices, from those of all blocks; differentiable.

        Args:
            h_is_one: whether the halves of an expert have the same h; else each half has units of its own, K = 2 k.
        """
        if self.halves == 1:
            return factors
        h, b, stream = factors
        h = h.unflatten(0, (self.experts, self.halves))  # [E, halves, in, k]
        if h_is_one:
            return Factors(h[:, 0], self.join(b), stream)
        k, units = b.shape[-1], self.halves * b.shape[-1]
        halves = b.unflatten(0, (self.experts, self.halves)).unbind(1)
        apart = [F.pad(half, (i * k, units - (i + 1) * k)).unsqueeze(1) for i, half in enumerate(halves)]
        return Factors(h.transpose(1, 2).flatten(2), self.join(torch.cat(apart, 1).flatten(0, 1)), stream)

    def _halves(self, matrices: Tensor) -> Tensor:
        """[E, out, in] -> [E, halves, out / halves, in]; a view."""
        if self.interleaved:
            return matrices.unflatten(1, (-1, self.halves)).transpose(1, 2)
        return matrices.unflatten(1, (self.halves, -1))
