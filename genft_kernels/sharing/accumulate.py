"""`accumulate`: one generation for all micro-batches of an optimizer step.

Within it the layers get leaves that hold the factors' values. The micro-batches' gradients add up in the leaves, and
when it ends the sums go through the generator in one backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..modules import GenFTLinear
from ..update import Factors
from .cache import LayerGroup, Settings, Share


@contextlib.contextmanager
def accumulate(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the adapter's updates are generated once; when it ends, their gradients reach the parameters.

        with accumulate(model):
            for batch in micro_batches:
                loss(model, batch).backward()
        optimizer.step()

    The gradients are those of the same passes without it: they add to `.grad`, but only when the context ends, so
    clip, unscale and step after it. What the updates' gradients sum up in is float32 or wider. Dropout of the column
    stage draws one mask for the whole context, that of the row stage a new one in each forward.

    Sharded layers, and what `torch.compile` has compiled, generate in every forward as ever. Under
    `DistributedDataParallel` let all but the last micro-batch run under its `no_sync()`, and leave
    `find_unused_parameters` off.

    Args:
        model: has layers with an adapter; it may be wrapped.

    Raises:
        ValueError: no such layer.
        RuntimeError: within another `accumulate` of these layers; a parameter changed within the context; a gradient
            arrives after its end. An exception within the context leaves no gradient of the update behind.
    """
    accumulation = Accumulation(model)
    accumulation.start()
    try:
        yield model
        accumulation.flush()
    finally:
        accumulation.stop()


class Accumulation:
    """The factors and gradient sums of `accumulate`, for those who cannot use a context."""

    def __init__(self, model: nn.Module) -> None:
        """ValueError if `model` has no layer with an adapter."""
        layers = [module for module in model.modules() if isinstance(module, GenFTLinear)]
        if not layers:
            raise ValueError("accumulate(model) needs a model with GenFT layers: call apply_genft(model, config) first")
        self.active = False
        self._groups = list({id(layer.generator.group): layer.generator.group for layer in layers}.values())
        self._held: dict[tuple[nn.Module, Settings], _Held] = {}

    def start(self) -> None:
        """From now on the layers get leaves; RuntimeError if they do so already."""
        if any(group.accumulation is not None for group in self._groups):
            raise RuntimeError("accumulate(model) does not nest: these layers are within one already")
        for group in self._groups:
            group.accumulation = self
        self.active = True

    def flush(self) -> None:
        """Send the sums on to the parameters and stop; RuntimeError if a parameter has changed since."""
        held = dict(self._held)
        self.stop()
        roots, grads = [], []
        for (layer, _), each in held.items():
            each.check_unchanged(layer)
            for root, leaf in each.pairs():
                if leaf.grad is not None:
                    roots.append(root)
                    grads.append(leaf.grad.to(root.dtype))
        if roots:
            torch.autograd.backward(roots, grads)

    def stop(self) -> None:
        """Drop factors and sums, if there are any; the layers generate as ever again."""
        for group in self._groups:
            if group.accumulation is self:
                group.accumulation = None
        self._held.clear()
        self.active = False

    def factors_for(
        self, group: LayerGroup, layer: nn.Module, settings: Settings, seeds: list[Tensor]
    ) -> list[Factors]:
        """As `LayerGroup.factors_for`, of leaves where gradients are recorded."""
        gradients = settings.gradients
        # A checkpointed region runs first without gradients, and must find what its repetition will.
        settings = settings._replace(gradients=True)
        held = self._held.get((layer, settings))
        if held is None:
            layers = [each for each in group.together_with(layer) if (each, settings) not in self._held]
            with torch.enable_grad():
                shares = group.generate(layers, settings, seeds)
            self._held.update({(each, settings): _Held(share, self) for each, share in shares.items()})
            held = self._held[layer, settings]
        return held.given if gradients else [f._replace(h=f.h.detach(), b=f.b.detach()) for f in held.given]

    def check_active(self, grad: Tensor) -> None:
        """A hook of the leaves: they must not take in what nobody will fetch."""
        if not self.active:
            raise RuntimeError(
                "a backward came after the end of the accumulate(model) in which its forward ran: move it inside"
            )


class _Held:
    """One layer's factors and their stand-ins."""

    def __init__(self, share: Share, accumulation: Accumulation) -> None:
        self._share = share
        self._factors = share.factors
        self._leaves = [Factors(_leaf(f.h), _leaf(f.b), f.stream) for f in self._factors]
        for leaf in self._leaves:  # one of the pair is enough: their gradients come together
            trained = leaf.h if leaf.h.requires_grad else leaf.b
            if trained.requires_grad:
                trained.register_hook(accumulation.check_active)
        # The cast back is part of a graph that keeps nothing, so every micro-batch's backward can run through it.
        self.given = [
            leaf._replace(h=leaf.h.to(f.h.dtype), b=leaf.b.to(f.b.dtype))
            for leaf, f in zip(self._leaves, self._factors, strict=True)
        ]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(factor, its leaf), of those that have gradients."""
        for factors, leaves in zip(self._factors, self._leaves, strict=True):
            for factor, leaf in ((factors.h, leaves.h), (factors.b, leaves.b)):
                if factor.requires_grad:
                    yield factor, leaf

    def check_unchanged(self, layer: nn.Module) -> None:
        if not self._share.holds(layer):
            raise RuntimeError(
                "a parameter changed within accumulate(model), whose gradients it has not received yet: "
                "step the optimizer after the context"
            )


def _leaf(factor: Tensor) -> Tensor:
    """A stand-in whose gradient adds up at least in float32."""
    wide = torch.promote_types(factor.dtype, torch.float32)
    return factor.detach().to(wide).requires_grad_(factor.requires_grad)
