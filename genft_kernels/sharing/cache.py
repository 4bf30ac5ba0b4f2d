"""Generation for all layers of a shape at once, kept for as long as it holds.

The factors of a layer do not depend on its input, so the first layer that is asked generates for its whole group, the
layers that share its generator; the others find theirs at hand. The table in genft_kernels/sharing/README.md has each
reason for which factors cease to hold.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _torch_private
from ..update import Factors
from .node import Generation, Recipe
from .share import Batch, Share
from .source import Layer, Settings, Source
from .weight_norm import WeightNorms

if TYPE_CHECKING:
    from .accumulate import Accumulation


_groups: weakref.WeakSet[LayerGroup] = weakref.WeakSet()


class LayerGroup:
    """The layers that share a generator, and the factors last generated for each.

    `generations` counts the calls of the generator. A copy of the group, as in a copied model, is empty: the copied
    layers join the group of their own generator.
    """

    def __init__(self) -> None:
        self.generations = 0
        self.accumulation: Accumulation | None = None  # while one is under way
        self._shares: weakref.WeakKeyDictionary[Layer, Share | None] = weakref.WeakKeyDictionary()
        self._norms = WeightNorms()
        self.lock = threading.Lock()
        _groups.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerGroup, ()

    @property
    def layers(self) -> list[Layer]:
        """The layers, in the order in which they joined."""
        return list(self._shares)

    def join(self, layer: Layer) -> None:
        """Make `layer` one of the group."""
        self._hold(layer, None)

    def forget(self, layer: Layer) -> None:
        """Drop what is kept of `layer`."""
        self._norms.forget(layer)
        if layer in self._shares:
            self._hold(layer, None)

    def _hold(self, layer: Layer, share: Share | None) -> None:
        vars(layer)["share"] = self._shares[layer] = share

    def factors_for(
        self, layer: Layer, dtype: torch.dtype, backend: str, seeds: list[Tensor], key: object = None
    ) -> list[Factors]:
        """The factors of the layer's adapted blocks in `dtype`.

        Args:
            backend: an operation backend by name.
            seeds: of this forward, int64 [1] for each adapted block. Where the layer makes the generation, they are
                its seeds in the column stage too. Unused where that has no dropout.
            key: all that the other arguments follow from, and the modes of PyTorch that are looked at. A forward
                of the same key may have what the share holds (genft_kernels/short_road.py).
        """
        source = layer.source()
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        settings = Settings(backend, dtype, source.dropout, gradients, inference, current_stream(source.weight.device))
        with self.lock:
            if self.accumulation is not None and layer in self.accumulation.offloaded:
                source = source._replace(obstacle="its parameters are offloaded")
            if self.accumulation is not None and not inference and source.reason_to_stay_alone() is None:
                return self.accumulation.factors_for(self, layer, source, settings, seeds, key)
            if settings.dropout > 0 and _may_be_repeated():
                # The repetition draws this forward's seeds again, but nothing that a group drew.
                return self.generate({layer: source}, settings, seeds, values=False)[layer].factors
            repeats = _torch_private.in_backward()
            share = self._shares.get(layer)
            factors = None if share is None else share.take(source, settings, repeats, key)
            return self._renew(layer, source, settings, seeds, repeats, key) if factors is None else factors

    def together_with(self, layer: Layer, source: Source) -> dict[Layer, Source]:
        """The layers to generate when `layer` asks, itself first."""
        together, cell = {layer: source}, source.cell
        if layer in self._shares and source.reason_to_stay_alone() is None:  # a replica is in no group
            for each in self.layers:
                other = source if each is layer else each.source()
                if other.cell == cell and other.reason_to_stay_alone() is None:
                    together[each] = other
        return together

    def generate(
        self, sources: Mapping[Layer, Source], settings: Settings, seeds: list[Tensor], *, values: bool
    ) -> dict[Layer, Share]:
        """One generation for some layers.

        Args:
            seeds: of the first one; the others' follow from them.
            values: whether those of all tensors are to be compared before the factors are used again.
        """
        counts = [len(source.blocks) for source in sources.values()]
        self.generations += 1
        with _torch_private.hidden_from_selective_checkpointing():
            seed = None
            if settings.dropout > 0:
                # Nothing is drawn: the repetition of a checkpointed region would not draw it. Keys that differ by one
                # give Philox streams that have nothing in common.
                others = torch.arange(1, 1 + sum(counts[1:]), device=seeds[0].device)
                seed = torch.cat([*seeds, seeds[0] + others])
            recipe = Recipe(list(sources.values()), settings, seed, self._norms.of(sources))
            batch = Batch(Generation(recipe), sources, values, settings.captured)
            starts = (sum(counts[:index]) for index in range(len(counts)))
            shares = {
                layer: Share(batch, layer, source, settings, start)
                for (layer, source), start in zip(sources.items(), starts, strict=True)
            }
            batch.shares = list(map(weakref.ref, shares.values()))
            return shares

    def explain(self) -> list[str]:
        """A line for each set of layers that are generated together, and for each reason to generate alone."""
        sources = [layer.source() for layer in self.layers]
        if not sources:
            return []
        shape = "{1}x{0}".format(*sources[0].blocks[0].shape)
        together = Counter(source.cell for source in sources if source.reason_to_stay_alone() is None)
        reasons = Counter(source.reason_to_stay_alone() for source in sources)
        del reasons[None]
        return [f"{shape}: {_layers(n)} on {cell[0]} in one generation" for cell, n in together.items()] + [
            f"{shape}: {_layers(n)} each in a generation of its own: {reason}" for reason, n in reasons.items()
        ]

    def _renew(
        self, layer: Layer, source: Source, settings: Settings, seeds: list[Tensor], repeats: bool, key: object
    ) -> list[Factors]:
        # In a backward (reentrant checkpointing) the gradient of a whole group would be computed for each region.
        sources = {layer: source} if repeats else self.together_with(layer, source)
        if (before := self._shares.get(layer)) is not None:
            before.batch.settle(settings)
        kept = not repeats and layer in self._shares and source.reason_to_stay_alone() is None
        # A single layer that trains never takes them again.
        shares = self.generate(sources, settings, seeds, values=kept and (len(sources) > 1 or not source.training))
        if kept:
            goes_on = before is None or before.asked_in != before.batch.round  # else it begins with this layer
            for each, share in shares.items():
                share.follow(self._shares.get(each), goes_on)
                self._hold(each, share)
            shares[layer].take(source, settings, repeats, key)
        return shares[layer].factors


def all_groups() -> list[LayerGroup]:
    """The groups of all generators that there are."""
    return list(_groups)


def _renew_locks() -> None:
    """In a process that was forked while another thread generated, nobody would ever release the lock."""
    for group in all_groups():
        group.lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew_locks)


def _may_be_repeated() -> bool:
    """Whether this forward may be one of a checkpointed region, or is its repetition."""
    return (
        not torch.is_grad_enabled()  # as reentrant checkpointing runs the region first
        or _torch_private.in_backward()
        or _torch_private.saved_tensors_are_hooked()  # as the other kind does
    )


def current_stream(device: torch.device) -> tuple[int, bool] | None:
    """On CUDA the current stream and whether it is being captured."""
    if device.type != "cuda":
        return None
    return _torch_private.current_stream(device), torch.cuda.is_current_stream_capturing()


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"
