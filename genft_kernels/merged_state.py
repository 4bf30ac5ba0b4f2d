"""State dicts of merged layers: they hold W + dW under W's name, so they carry a mark and are not taken for others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MARK = "merged"


class MarksMerged(nn.Module):
    """A layer with `merged`, whose state dict says so, and which takes in no state that would add its update twice."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + MARK] = torch.tensor(True)

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
