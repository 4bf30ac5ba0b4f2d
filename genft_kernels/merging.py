"""W + dW in W's place: how an update is merged and unmerged, and the mark that a merged layer's state dict carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .units import GenFTUpdate

MARK = "merged"


class MarksMerged(nn.Module):
    """A layer with `merged`, whose state dict says so, and which takes in no state that would add its update twice."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + MARK] = torch.tensor(True, device="cpu")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        errors = lists[-1]  # the others are the missing and the unexpected keys
        if self.merged:
            errors.append(f"{prefix[:-1]!r} is merged: call unmerge(model) before loading a state dict")
        elif prefix + MARK in state_dict:
            errors.append(
                f"the state dict holds {prefix[:-1]!r} merged, so its update would be added twice: save it after "
                "unmerge(model), or load it into a plain model (strict=False leaves the rest of the adapter out)"
            )
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


class MergeableUpdate(GenFTUpdate):
    """An update, or all of a layer's, that the weight of a plain layer can hold: W + dW is bound in W's place."""

    _unmerged: nn.Parameter | None = None  # W while it is merged; not registered
    enabled = True  # False within `disabled(model)`

    @property
    def _place(self) -> tuple[nn.Module, str]:
        """The module that has the weight, and under which name."""
        raise NotImplementedError

    def _updated_weight(self) -> Tensor:
        """W + dW as W is stored, in its dtype."""
        raise NotImplementedError

    @property
    def updates(self) -> dict[str, GenFTUpdate]:
        """The updates of the weight, by their paths within the layer."""
        return {"": self}

    @property
    def merged(self) -> bool:  # type: ignore[override]
        """Whether the weight holds W + dW."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Rebind the weight to W + dW, rounded to nearest; W itself is kept untouched for `unmerge`.

        Raises:
            RuntimeError: already merged; or the weight is computed, or the units are by a hook.
        """
        if self.merged:
            raise RuntimeError("the update is merged already: call unmerge() first")
        (owner, name), updates = self._place, self.updates.values()
        # A hook computes them before each forward, and not now.
        computed = any(unit in vars(update) for update in updates for unit in update.specific_names)
        if computed or name not in owner._parameters:
            raise RuntimeError(
                "its weight or its units are computed (pruned or parametrized): make that permanent first "
                "(prune.remove, parametrize.remove_parametrizations)"
            )
        frozen, merged = owner._parameters[name], self._updated_weight()
        setattr(owner, name, nn.Parameter(merged, requires_grad=False))
        self.__dict__["_unmerged"] = frozen
        for update in updates:
            update.generator.group.forget(update)

    def unmerge(self) -> None:
        """Rebind the weight to the very W that it was.

        Raises:
            RuntimeError: not merged.
        """
        if not self.merged:
            raise RuntimeError("the update is not merged")
        owner, name = self._place
        setattr(owner, name, self.__dict__.pop("_unmerged"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergeableUpdate:
        super()._apply(fn, recurse)
        if self._unmerged is not None:  # not registered, so it is moved by hand
            self._unmerged.data = fn(self._unmerged.data)
        return self
