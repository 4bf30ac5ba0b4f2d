"""The norms of frozen weights, which rho is made of (`weight_ratio="rms"`), kept for as long as W is what it was.

To take them reads all of W, which with few tokens is a tenth of a training step on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from ..update import norms_of
from . import snapshot
from .source import Layer, Source


class WeightNorms:
    """The norms of each layer's adapted blocks, where a change of W is seen at once: elsewhere they are taken anew."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Layer, tuple[snapshot.Snapshot, Tensor]] = weakref.WeakKeyDictionary()

    def of(self, sources: Mapping[Layer, Source]) -> Tensor | None:
        """The blocks' norms, layer after layer; None where nothing is made of them, or W is to be looked at anew."""
        first = next(iter(sources.values()))
        if first.config.weight_ratio != "rms" or not snapshot.compares_at_once(first.weight.device):
            return None
        norms = [self._of_layer(layer, source) for layer, source in sources.items()]
        return torch.cat(norms) if len(norms) > 1 else norms[0]

    def forget(self, layer: Layer) -> None:
        """Drop those of `layer`."""
        self._kept.pop(layer, None)

    def _of_layer(self, layer: Layer, source: Source) -> Tensor:
        kept = self._kept.get(layer)
        if kept is None or not kept[0].same((), source.weight):
            kept = self._kept[layer] = snapshot.Snapshot((), source.weight, values=True), norms_of(source.blocks)
        return kept[1]
