"""`accumulate`: one generation for all micro-batches of an optimizer step.

Within it the layers get leaves that hold the factors' values. The micro-batches' gradients add up in the leaves, and
when it ends the sums go through the generator in one backward. Until then parameters without a gradient have -0.0 as a
mark: `zero_grad`, which takes it away or makes it 0.0, tells that the sums so far are not wanted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _torch_private
from ..arguments import check_type
from ..update import Factors
from .cache import LayerGroup, all_groups
from .share import Share
from .source import Layer, Settings, Source


@contextlib.contextmanager
def accumulate(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the adapter's updates are generated once; when it ends, their gradients reach the parameters.

        with accumulate(model):
            for batch in micro_batches:
                loss(model, batch).backward()
        optimizer.step()

    The gradients are those of the same passes without it: they add to `.grad`, but only when the context ends, so
    clip, unscale and step after it. `zero_grad` within it drops what came before, as ever, of some parameters or of
    all. The updates' gradients are summed in float32 or wider. Of `transform="both"` the first stage's dropout draws
    one mask for the whole context, all other dropout a new one in each forward. Until it ends nothing leads from a loss
    to the adapter's parameters: `backward(inputs=...)` and `autograd.grad` find none of their gradients.

    Layers that are sharded or offloaded, and what `torch.compile` has compiled, generate in every forward as ever.
    Under `DistributedDataParallel` let all but the last micro-batch run under its `no_sync()`; its
    `find_unused_parameters` and `static_graph` have to be off.

    Args:
        model: has layers with an adapter; it may be wrapped.

    Raises:
        ValueError: no such layer.
        RuntimeError: within another `accumulate` of these layers; a parameter changed within the context; a gradient
            arrives after its end; a forward under a `DistributedDataParallel` that looks for unused parameters. An
            exception within the context leaves no gradient of the update behind.
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
        """ValueError if `model` has no layer with an adapter, TypeError if it is no module."""
        check_type("model", model, nn.Module)
        modules = set(model.modules())
        self._groups = [group for group in all_groups() if not modules.isdisjoint(group.layers)]
        if not self._groups:
            raise ValueError("accumulate(model) needs a model with GenFT layers: call apply_genft(model, config) first")
        self.active = False
        self.offloaded: set[Layer] = set()  # layers with tensors that are here for a forward only
        self._held: dict[tuple[Layer, Settings], _Held] = {}
        # By layer and the key of `LayerGroup.factors_for`, for who asks again (genft_kernels/short_road.py).
        self.by_key: dict[tuple[Layer, object], list[Factors]] = {}
        self._marks = _Marks(self._look)
        self._end: Callable[[], object] = lambda: None  # a weak reference to what the pass under way calls at its end

    def start(self) -> None:
        """From now on the layers get leaves; RuntimeError if they do so already."""
        if any(group.accumulation is not None for group in self._groups):
            raise RuntimeError("accumulate(model) does not nest: these layers are within one already")
        sources = {layer: layer.source() for group in self._groups for layer in group.layers}
        self.offloaded = {
            layer
            for layer, source in sources.items()
            if any(tensor.is_meta for tensor in (*source.watched, *source.shared.values()))
        }
        for group in self._groups:
            group.accumulation = self
        self.active = True

    def flush(self) -> None:
        """Send the sums on to the parameters and stop; RuntimeError if a parameter has changed since."""
        if self._end() is None:
            self._heed_zero_grad()
        held = dict(self._held)
        self.stop()
        _send_on(held)

    def stop(self) -> None:
        """Drop factors and sums, if there are any; the layers generate as ever again."""
        for group in self._groups:
            if group.accumulation is self:
                group.accumulation = None
        self.offloaded.clear()
        self._held.clear()
        self.by_key.clear()
        self._marks.remove()
        self.active = False

    def factors_for(
        self, group: LayerGroup, layer: Layer, source: Source, settings: Settings, seeds: list[Tensor], key: object
    ) -> list[Factors]:
        """As `LayerGroup.factors_for`, of leaves where gradients are recorded."""
        gradients = settings.gradients
        # A checkpointed region runs first without gradients, and must find what its repetition will.
        settings = settings._replace(gradients=True)
        held = self._held.get((layer, settings))
        if held is None:
            _check_data_parallel()
            together = group.together_with(layer, source)
            sources = {each: one for each, one in together.items() if (each, settings) not in self._held}
            with torch.enable_grad():
                shares = group.generate(sources, settings, seeds, values=True)
                self._held.update({(each, settings): _Held(share, self._arrives) for each, share in shares.items()})
            self._marks.plant(tensor for one in sources.values() for tensor in one.thin)
            held = self._held[layer, settings]
        given = held.given if gradients else [f._replace(h=f.h.detach(), b=f.b.detach()) for f in held.given]
        self.by_key[layer, key] = given
        return given

    def _arrives(self, grad: Tensor) -> None:
        """A hook of the leaves, before they take a gradient in."""
        if not self.active:  # nobody will fetch it
            raise RuntimeError(
                "a backward came after the end of the accumulate(model) in which its forward ran: move it inside"
            )
        self._look(grad)

    def _look(self, grad: Tensor) -> None:
        """A hook of leaves and marked parameters: before the first gradient of a pass arrives, was `zero_grad` called?

        The passes within a pass, of reentrant checkpointing, belong to it: parameters may have received of it already.
        """
        if self._end() is None:
            self._heed_zero_grad()
            end = self._marks.note
            _torch_private.when_backward_ends(end)
            self._end = weakref.ref(end)  # autograd alone holds it, and drops it after a pass that failed, too

    def _heed_zero_grad(self) -> None:
        """If `zero_grad` was called, drop the sums so far; first send them on to the parameters that it has spared."""
        if cleared := self._marks.cleared():
            if spared := self._marks.renew(cleared):
                _send_on(self._held, spared)
            for each in self._held.values():
                for _, leaf in each.pairs():
                    leaf.grad = None


def _check_data_parallel() -> None:
    """Raise where the forward's processes would take for unused what receives its gradients as the context ends.

    The wrapper is asked while it runs, since who accumulates may have the model inside alone.
    """
    wrapper = _torch_private.data_parallel_under_way()
    for option in ("find_unused_parameters", "static_graph"):
        if getattr(wrapper, option, False):
            raise RuntimeError(
                f"accumulate(model) does not go with DistributedDataParallel(..., {option}=True), which looks in a "
                "backward for the parameters that are used: the adapter's receive their gradients after it. Leave it "
                "out"
            )


def _send_on(held: Mapping[tuple[Layer, Settings], _Held], parameters: Sequence[Tensor] | None = None) -> None:
    """Have the sums go through the generator, to some parameters or to all."""
    roots, grads = [], []
    for (layer, _), each in held.items():
        each.check_unchanged(layer.source())
        for root, leaf in each.pairs():
            if leaf.grad is not None:
                roots.append(root)
                grads.append(leaf.grad.to(root.dtype))
    if roots:
        torch.autograd.backward(roots, grads, inputs=parameters)


class _Marks:
    """Gradients whose zeros are all -0.0, by which to tell whether `zero_grad` was called: that leaves 0.0 or None.

    What is scaled by a positive number, as by clipping, or divided between processes, stays -0.0; -0.0 + g is g.
    """

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        self._look = look  # a hook to run before a marked parameter receives
        self._marks: dict[Tensor, tuple[Tensor, int, bool]] = {}  # the gradient, its version, whether planted
        self._hooks: list[RemovableHandle] = []

    def plant(self, parameters: Iterable[Tensor]) -> None:
        """Mark those that train and are not marked yet."""
        new = dict.fromkeys(each for each in parameters if each.requires_grad and each not in self._marks)
        self._mark(new)
        self._hooks += [parameter.register_hook(self._look) for parameter in new]

    @torch.no_grad()
    def _mark(self, parameters: Iterable[Tensor]) -> None:
        """All at once, since gradients may be views of one tensor, whose version is that of them all."""
        marked = {}
        for parameter in parameters:
            grad, planted = parameter.grad, parameter.grad is None
            if grad is None:
                grad = parameter.grad = torch.full_like(parameter, -0.0)
            else:
                grad.masked_fill_(grad == 0, -0.0)
            marked[parameter] = grad, planted
        self._marks |= {parameter: (grad, grad._version, planted) for parameter, (grad, planted) in marked.items()}

    def note(self) -> None:
        """After a pass, mark what it has changed: zeros that another part of the loss has added are no `zero_grad`.

        One that a hook of the user's has taken away is marked anew.
        """
        changed = [
            parameter
            for parameter, (grad, version, _) in self._marks.items()
            if parameter.grad is not grad or grad._version != version
        ]
        self._mark(changed)

    def cleared(self) -> set[Tensor]:
        """The parameters whose gradient was taken away, or overwritten by 0.0."""
        return {
            parameter
            for parameter, (grad, version, _) in self._marks.items()
            if parameter.grad is None or (parameter.grad is grad and grad._version != version and _is_plus_zero(grad))
        }

    def renew(self, cleared: set[Tensor]) -> list[Tensor]:
        """Mark those anew, and return the others."""
        for parameter in cleared:
            self._unmark(parameter)
        self._mark(cleared)
        return [parameter for parameter in self._marks if parameter not in cleared]

    def remove(self) -> None:
        """Take away the zeros that are still there."""
        for parameter in self._marks:
            self._unmark(parameter)
        self._marks.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _unmark(self, parameter: Tensor) -> None:
        grad, version, planted = self._marks[parameter]
        if planted and parameter.grad is grad and (grad._version == version or not grad.any()):
            parameter.grad = None


def _is_plus_zero(grad: Tensor) -> bool:
    """Whether all is 0.0 and nothing -0.0."""
    return not bool((grad.signbit() | (grad != 0)).any())


class _Held:
    """One layer's factors and their stand-ins."""

    def __init__(self, share: Share, arrives: Callable[[Tensor], None]) -> None:
        self._share = share
        self._factors = share.factors
        self._leaves = [Factors(_leaf(f.h), _leaf(f.b), f.stream) for f in self._factors]
        for _, leaf in self.pairs():
            leaf.register_hook(arrives)
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

    def check_unchanged(self, source: Source) -> None:
        if not self._share.holds(source):
            raise RuntimeError(
                "a parameter changed within accumulate(model), whose gradients it has not received yet: "
                "step the optimizer after the context"
            )


def _leaf(factor: Tensor) -> Tensor:
    """A stand-in whose gradient adds up at least in float32."""
    wide = torch.promote_types(factor.dtype, torch.float32)
    return factor.detach().to(wide).requires_grad_(factor.requires_grad)
