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
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _torch_private
from ..update import Factors
from .node import Generation, Options
from .snapshot import Snapshot, Watch, compares_at_once, sample
from .source import Source, Watched
from .weight_norm import WeightNorms


class Layer(Protocol):
    """What has factors: all that sharing reads of it is one value."""

    def source(self) -> Source:
        """What its factors are generated from, as it is now."""
        ...

    def watched(self) -> Watched:
        """W, the layer's own tensors and the shared ones, as `source` has them."""
        ...


class Settings(NamedTuple):
    """What factors are generated under."""

    backend: str
    dtype: torch.dtype
    dropout: float  # of the column stage, in effect
    gradients: bool
    inference: bool
    stream: tuple[int, bool] | None  # on CUDA, the stream and whether it is being captured

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is being made of what is computed."""
        return self.stream is not None and self.stream[1]


class Share:
    """One layer's part of a generation."""

    def __init__(self, batch: Batch, source: Source, settings: Settings, start: int) -> None:
        self.batch, self._settings = batch, settings
        self._blocks = slice(start, start + len(source.blocks))
        self._own = Snapshot(source.own.values(), source.weight, values=batch.values)
        self.asked: object = None  # of `LayerGroup.at_hand`, by the forward that took it last
        self._readers: set[int] = set()  # the threads that have taken it
        self._round: int | None = None  # in which it was taken last

    @property
    def factors(self) -> list[Factors]:
        """Those of the layer's adapted blocks, of a fresh generation."""
        return self.batch.generation.factors[self._blocks]

    def holds(self, source: Source) -> bool:
        """Whether what the factors were generated from is as it was."""
        return self._own.same(source.own.values(), source.weight) and self.batch.shared.same(source.shared.values())

    def _is_first_of_a_round(self) -> bool:
        """Whether it is for this layer to have the shared tensors compared in full.

        A round ends when a layer asks again, and a layer that has taken part in the round before this one is taken to
        belong to the same forward as the others.
        """
        before, self._round = self._round, self.batch.round
        if before == self.batch.round:
            self.batch.round = self._round = before + 1
            return True
        return before != self.batch.round - 1

    def take(
        self, layer: Layer, source: Source, settings: Settings, repeats: bool, asked: object
    ) -> list[Factors] | None:
        """The factors for a forward of `layer`, or None if they do not hold for it.

        In training a layer takes them once, but for the repetition of a checkpointed region.
        """
        reader = threading.get_ident()
        spent = source.training and reader in self._readers and not repeats
        if spent or self._settings != settings or (factors := self.held(layer, source.watched)) is None:
            return None
        self._readers.add(reader)
        self.asked = asked
        return factors

    def held(self, layer: Layer, watched: Watched) -> list[Factors] | None:
        """The factors under the settings that they were made under, or None if they hold no more."""
        weight, own, shared = watched
        factors = self.batch.generation.factors  # read once: the backward of another thread may consume them meanwhile
        if factors is None or not self._own.same(own, weight):
            return None
        if not self.batch.shared.same(shared, in_full=self._is_first_of_a_round()):
            return None
        if self.batch.watch is not None:
            self.batch.look(layer, self._settings)
        return factors[self._blocks]


class Batch:
    """A generation, and what tells whether the layers that it was made for may still use it."""

    def __init__(self, generation: Generation, sources: Mapping[Layer, Source], values: bool) -> None:
        self.generation, self.values, self.round = generation, values, 0
        first = next(iter(sources.values()))
        self.shared = Snapshot(first.shared.values(), values=values)
        self._layers = [weakref.ref(layer) for layer in sources]
        self._seen: weakref.WeakSet[Layer] = weakref.WeakSet()  # in this round
        watched = values and not (first.training or compares_at_once(first.weight.device))
        self.watch = Watch(_watched(sources.values())) if watched else None

    def look(self, layer: Layer, settings: Settings) -> None:
        """Have a device compare all values once a round, which ends when a layer asks again; raises as `settle`."""
        if self.watch is None or settings.captured:
            return
        if layer not in self._seen:
            self._seen.add(layer)
            return
        self._seen = weakref.WeakSet([layer])
        self.settle(settings)
        layers = [reference() for reference in self._layers]
        if None in layers:
            self.generation.factors = None
        else:
            self.watch.look(_watched([each.source() for each in layers]))

    def settle(self, settings: Settings) -> None:
        """Read what a device has found.

        Raises:
            RuntimeError: a change, in the round before.
        """
        if self.watch is not None and not settings.captured and self.watch.changed():
            self.generation.factors = None
            raise RuntimeError(
                "the last forward used updates that were out of date: a parameter or W was changed where no version "
                "tells (through .data, a view of its memory, another process); change it under torch.no_grad(), or "
                "call genft_kernels.refresh(model) after the change"
            )


_groups: weakref.WeakSet[LayerGroup] = weakref.WeakSet()


class LayerGroup:
    """The layers that share a generator, and the factors last generated for each.

    `generations` counts the calls of the generator. A copy of the group, as in a copied model, is empty: the copied
    layers join the group of their own generator.
    """

    def __init__(self) -> None:
        self.generations = 0
        self.accumulation = None  # an `accumulate.Accumulation` while one is under way
        self._shares: weakref.WeakKeyDictionary[Layer, Share | None] = weakref.WeakKeyDictionary()
        self._norms = WeightNorms()
        self.lock = threading.Lock()
        _groups.add(self)

    def __reduce__(self):
        return LayerGroup, ()

    @property
    def layers(self) -> list[Layer]:
        """The layers, in the order in which they joined."""
        return list(self._shares)

    def join(self, layer: Layer) -> None:
        """Make `layer` one of the group."""
        self._shares[layer] = None

    def forget(self, layer: Layer) -> None:
        """Drop what is kept of `layer`."""
        self._norms.forget(layer)
        if layer in self._shares:
            self._shares[layer] = None

    def factors_for(
        self, layer: Layer, dtype: torch.dtype, backend: str, seeds: list[Tensor], asked: object = None
    ) -> list[Factors]:
        """The factors of the layer's adapted blocks in `dtype`.

        Args:
            backend: an operation backend by name.
            seeds: of this forward, int64 [1] for each adapted block. Where the layer makes the generation, they are
                its seeds in the column stage too. Unused where that has no dropout.
            asked: of `at_hand`, which may answer the next forward.
        """
        source = layer.source()
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        settings = Settings(backend, dtype, source.dropout, gradients, inference, current_stream(source.weight.device))
        with self.lock:
            if self.accumulation is not None and not inference and source.reason_to_stay_alone() is None:
                return self.accumulation.factors_for(self, layer, source, settings, seeds)
            if settings.dropout > 0 and _may_be_repeated():
                # The repetition draws this forward's seeds again, but nothing that a group drew.
                return self.generate({layer: source}, settings, seeds, values=False)[layer].factors
            repeats = _torch_private.in_backward()
            share = self._shares.get(layer)
            factors = None if share is None else share.take(layer, source, settings, repeats, asked)
            return self._renew(layer, source, settings, seeds, repeats, asked) if factors is None else factors

    def at_hand(self, layer: Layer, asked: object) -> list[Factors] | None:
        """The factors of a layer in evaluation, if who took them last asked the same and they hold; else None.

        Args:
            asked: all that the arguments of `factors_for` follow from, and the modes of PyTorch that it looks at.
        """
        with self.lock:
            share = self._shares.get(layer)
            if share is None or share.asked != asked:
                return None
            return share.held(layer, layer.watched())

    def together_with(self, layer: Layer, source: Source) -> dict[Layer, Source]:
        """The layers to generate when `layer` asks, itself first."""
        together = {layer: source}
        if layer in self._shares and source.reason_to_stay_alone() is None:  # a replica is in no group
            for each in self.layers:
                other = source if each is layer else each.source()
                if other.cell == source.cell and other.reason_to_stay_alone() is None:
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
            options = Options(settings.dtype, settings.dropout, seed, settings.backend, self._norms.of(sources))
            batch = Batch(Generation(list(sources.values()), options), sources, values)
            starts = (sum(counts[:index]) for index in range(len(counts)))
            return {
                layer: Share(batch, source, settings, start)
                for (layer, source), start in zip(sources.items(), starts, strict=True)
            }

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
        self, layer: Layer, source: Source, settings: Settings, seeds: list[Tensor], repeats: bool, asked: object
    ) -> list[Factors]:
        # In a backward (reentrant checkpointing) the gradient of a whole group would be computed for each region.
        sources = {layer: source} if repeats else self.together_with(layer, source)
        if (before := self._shares.get(layer)) is not None:
            before.batch.settle(settings)
        kept = not repeats and layer in self._shares and source.reason_to_stay_alone() is None
        # A single layer that trains never takes them again.
        shares = self.generate(sources, settings, seeds, values=kept and (len(sources) > 1 or not source.training))
        if kept:
            self._shares.update(shares)
            shares[layer].take(layer, source, settings, repeats, asked)
        return shares[layer].factors


def all_groups() -> list[LayerGroup]:
    """Those of all generators there are."""
    return list(_groups)


def _renew_locks() -> None:
    """In a process that was forked while another thread generated, nobody would ever release the lock."""
    for group in all_groups():
        group.lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew_locks)


def _watched(sources: Iterable[Source]) -> list[Tensor]:
    """All whose values count, of layers that share a generator."""
    sources = list(sources)
    own = [part for source in sources for part in (*source.own.values(), sample(source.weight))]
    return [*sources[0].shared.values(), *own]


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
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"
