"""Findings of an adapted model's first forward: layers that did not run, and trained modules that do not train.

Some models read the weight of a layer without calling it (fused kernels do), and an update of it is ignored. Which ones
cannot be known beforehand, so the first forward is watched; later ones are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .adapted_model import is_enabled, look_once
from .arguments import about, listing, warn
from .quantised_linear import check_stored


class FirstForward:
    """Watches until the model's forward has run once outside of `torch.compile` and `disabled`; then it is gone."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._waiting = {
            name: layer.register_forward_pre_hook(partial(self._before, name)) for name, layer in layers.items()
        }
        self._handle: RemovableHandle | None = model.register_forward_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what hangs on modules that are gone, taken out of the model say, which torch cannot copy."""
        waiting = {name: handle for name, handle in self._waiting.items() if handle.hooks_dict_ref() is not None}
        gone = self._handle is None or self._handle.hooks_dict_ref() is None
        return {"_waiting": waiting, "_handle": None if gone else self._handle}

    def __call__(self, model: nn.Module, args: object, output: object) -> None:
        """The model's forward has run."""
        if torch.compiler.is_compiling() or not is_enabled(model):
            return
        # By their hooks: a layer may have been taken out or replaced, and another one have got its name.
        present = {id(module._forward_pre_hooks) for module in model.modules()}
        waiting = list(self._waiting.items())
        names = [repr(name) for name, handle in waiting if id(handle.hooks_dict_ref()) in present]
        self.stop()
        if names and not _is_compiled(model):
            warn(
                f"adapted, but not called in the model's first forward: {listing(names, 3)}. If the model reads a "
                "layer's weight past the layer, its update is ignored there and does not train: leave it out by "
                "exclude_modules"
            )
        look_once(model)

    def stop(self) -> None:
        """Watch no more."""
        for name in list(self._waiting):
            self._note(name)
        if self._handle is not None:
            self._handle.remove()

    def _before(self, name: str, layer: nn.Module, args: object) -> None:
        """A hook of one layer."""
        if not torch.compiler.is_compiling():
            with about(repr(name)):
                check_stored(layer)
            self._note(name)

    def _note(self, name: str) -> None:
        """This layer has been called."""
        handle = self._waiting.pop(name, None)  # another thread may have been quicker
        if handle is not None:
            handle.remove()


def _is_compiled(model: nn.Module) -> bool:
    """Whether parts of it may have run without a trace."""
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
