"""Findings of an adapted model's first forward: layers that did not run, and trained modules that do not train.

Some models read the weight of a layer without calling it (fused kernels do), and an update of it is ignored. Which ones
cannot be known beforehand, so the first forward is watched; later ones are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .arguments import about, listing, warn
from .quantised_linear import check_stored


class FirstForward:
    """Watches until the model's forward has run once outside of `torch.compile` and `disabled`; then it is gone."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        is_enabled: Callable[[nn.Module], bool],
        look_once: Callable[[nn.Module], None],
    ) -> None:
        self._waiting = {name: layer.register_forward_pre_hook(_Note(self, name)) for name, layer in layers.items()}
        self._handle = model.register_forward_hook(self)
        self._is_enabled, self._look_once = is_enabled, look_once

    def __call__(self, model: nn.Module, args: object, output: object) -> None:
        """The model's forward has run."""
        if torch.compiler.is_compiling() or not self._is_enabled(model):
            return
        names = [repr(name) for name in self._waiting]
        self.stop()
        if names and not _is_compiled(model):
            warn(
                f"adapted, but not called in the model's first forward: {listing(names, 3)}. If the model reads a "
                "layer's weight past the layer, its update is ignored there and does not train: leave it out by "
                "exclude_modules"
            )
        self._look_once(model)

    def stop(self) -> None:
        """Watch no more."""
        for name in list(self._waiting):
            self.note(name)
        self._handle.remove()

    def note(self, name: str) -> None:
        """This layer has been called."""
        handle = self._waiting.pop(name, None)  # another thread may have been quicker
        if handle is not None:
            handle.remove()


class _Note:
    """A hook of one layer."""

    def __init__(self, watch: FirstForward, name: str) -> None:
        self._watch, self._name = watch, name

    def __call__(self, layer: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            with about(repr(self._name)):
                check_stored(layer)
            self._watch.note(self._name)


def _is_compiled(model: nn.Module) -> bool:
    """Whether parts of it may have run without a trace."""
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
