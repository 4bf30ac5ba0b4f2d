"""A layer's part of a generation, and whether it still holds."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..update import Factors
from .node import Generation
from .snapshot import Glance, Snapshot, Together, Watch, compares_at_once, sample
from .source import Layer, Settings, Source


class Share:
    """One layer's part of a generation."""

    def __init__(self, batch: Batch, layer: Layer, source: Source, settings: Settings, start: int) -> None:
        self.batch, self._layer, self._settings = batch, weakref.ref(layer), settings
        self._training = source.training
        self._once = source.training or settings.captured
        self._blocks = slice(start, start + len(source.blocks))
        self.own = Snapshot(source.own.values(), source.weight, values=batch.values)
        self._glance: Glance | None = None
        self.key: object = None  # of `LayerGroup.factors_for`, of the forward that took it last
        self._readers: set[int] = set()  # the threads that have taken it
        self.asked_in = self.compared_in = 0  # rounds of the batch

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied layer has none

    @property
    def factors(self) -> list[Factors]:
        """The factors of the layer's adapted blocks, of a fresh generation."""
        factors = self.batch.generation.factors
        assert factors is not None
        return factors[self._blocks]

    def holds(self, source: Source) -> bool:
        """Whether what the factors were generated from is as it was."""
        return self.own.same(source.own.values(), source.weight) and self.batch.shared.same(source.shared.values())

    def take(self, source: Source, settings: Settings, repeats: bool, key: object) -> list[Factors] | None:
        """The factors for a forward of the layer, or None if they do not hold for it.

        In training a layer takes them once, but for the repetition of a checkpointed region; so it does as CUDA graphs
        are captured, where the next forward may be another graph's. And none that another mode has made, since in
        training less is looked at.
        """
        if self._settings != settings or self._training != source.training:
            return None
        factors = self.held(source.watched, source.shared.values(), repeats)
        if factors is not None:
            self._readers.add(threading.get_ident())
            self.key = key
        return factors

    def follow(self, before: Share | None, goes_on: bool) -> None:
        """Replace `before`: with its settings, mode and W keep its key, so that who asks as last time finds these."""
        if before is None:
            return
        if goes_on and before.asked_in == before.batch.round and not self._training:
            self.asked_in = self.batch.round  # the same round, which is the first one of this batch
        if (before._settings, before._training) != (self._settings, self._training):
            return
        if before.own.begins_as(self.own):
            self.key = before.key

    def held(self, own: list[Tensor], shared: Collection[Tensor], repeats: bool = False) -> list[Factors] | None:
        """The factors under the settings that they were made under, or None if they hold no more.

        Args:
            own, shared: W and the layer's own tensors, and the generator's, as they are now.
            repeats: this thread may have them although it has taken them, also where a layer takes them once.
        """
        batch, once = self.batch, self._once and not repeats
        # What nobody compares is for the thread alone that has made it, and taken it.
        if once and (not batch.values or (reader := threading.get_ident()) in self._readers):
            return None
        if self.asked_in == batch.round and batch.generation.factors is not None:
            batch.begin_round(shared, self._settings)
        factors = batch.generation.factors  # read once: the backward of another thread may consume them meanwhile
        if factors is None:
            return None
        if self._glance is not None and self.compared_in == batch.round:
            same = self._glance.same([*own, *shared])
        else:
            same = self.own.same(own[1:], own[0]) and batch.shared.same(shared)
        if not same:
            return None
        self.asked_in = batch.round
        if once:
            self._readers.add(reader)
        return factors[self._blocks]

    def compare(self, shared: Collection[Tensor], own: list[Tensor]) -> bool:
        """Whether the layer's tensors are what they were, in full, in a round in which the generator's are."""
        if not own or not self.own.same(own[1:], own[0]):
            return False
        self.compared_in = self.batch.round
        if self._glance is None:
            self._glance = Glance([*own, *shared], values=self.batch.values, gradients=self._settings.gradients)
        return True

    def watched(self) -> list[Tensor]:
        """The layer's, if there still is one."""
        layer = self._layer()
        return [] if layer is None else layer.watched()


class Batch:
    """A generation, and what tells whether the layers that it was made for may still use it.

    A round is a forward of the model, or of a part of it: it ends when a layer asks again. The first layer to ask in a
    round has all tensors compared in full of those that asked in the round before, which are taken to belong to the
    same forward; these have a glance at their own then. Any other one compares in full itself.
    """

    def __init__(self, generation: Generation, sources: Mapping[Layer, Source], values: bool, captured: bool) -> None:
        self.generation, self.values, self.round = generation, values, 1
        self.shares: list[weakref.ref[Share]] = []  # of all layers
        first = next(iter(sources.values()))
        self.shared = Snapshot(first.shared.values(), values=values)
        training = all(source.training for source in sources.values())
        watched = values and not (training or captured or compares_at_once(first.weight.device))
        self._together: Together | None = None  # of the layers `_members`, by id
        self._members: list[int] = []
        own = [source.watched for source in sources.values()]
        self._watch = Watch(_values(first.shared.values(), own)) if watched else None

    def begin_round(self, shared: Collection[Tensor], settings: Settings) -> None:
        """Have values compared: on a device those of all layers, to be read in the next round; raises as `settle`."""
        self.settle(settings)
        last, self.round = self.round, self.round + 1
        if len(self.shares) == 1 and self._watch is None:
            return  # a single layer compares itself
        shares = [share for reference in self.shares if (share := reference()) is not None]
        if self._watch is None:
            shares = [share for share in shares if share.asked_in == last]
        layers = [share.watched() for share in shares]
        same = self._compare(shares, layers, shared)
        if self._watch is not None:
            if same and len(shares) == len(self.shares):
                self._watch.look(_values(shared, layers))
            else:
                self.generation.factors = None

    def _compare(self, shares: list[Share], layers: list[list[Tensor]], shared: Collection[Tensor]) -> bool:
        """Whether the tensors of some layers are what they were; each layer for which they are knows it afterwards."""
        tensors, members = [*shared, *itertools.chain(*layers)], list(map(id, shares))
        if self._together is not None and self._members == members and self._together.same(tensors):
            for share in shares:
                share.compared_in = self.round
            return True
        same = self.shared.same(shared) and all(
            [share.compare(shared, own) for share, own in zip(shares, layers, strict=True)]
        )
        snapshots = [self.shared, *(share.own for share in shares)]
        flat = same and not any(snapshot.strided for snapshot in snapshots)
        self._members, self._together = members, Together(snapshots, tensors) if flat else None
        return same

    def settle(self, settings: Settings) -> None:
        """Read what a device has found.

        Raises:
            RuntimeError: a change, in the round before.
        """
        if self._watch is not None and not settings.captured and self._watch.changed():
            self.generation.factors = None
            raise RuntimeError(
                "the last forward used updates that were out of date: a parameter or W was changed where no version "
                "tells (through .data, a view of its memory, a CUDA graph, another process); change it under "
                "torch.no_grad(), or call genft_kernels.refresh(model) after the change"
            )


def _values(shared: Iterable[Tensor], layers: Iterable[list[Tensor]]) -> list[Tensor]:
    """All whose values count, of layers that share a generator: of each, W and its own tensors."""
    return [*shared, *(part for weight, *own in layers for part in (*own, sample(weight)))]
