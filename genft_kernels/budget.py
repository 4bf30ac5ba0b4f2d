"""s and r for a given number of trained parameters."""

from __future__ import annotations

import math

from torch import nn

from .adapt import find_plan
from .arguments import is_integer, shown
from .config import GenFTConfig, replaced
from .defaults import settled


def within_budget(model: nn.Module, parameters: int, config: GenFTConfig) -> GenFTConfig:
    """`config` with the s and r that `GenFTConfig.for_budget` promises, in its own proportion."""
    if not is_integer(parameters) or parameters < 1:
        raise ValueError(f"parameters must be an integer of at least 1, got {shown(parameters)}")
    config = settled(model, config)
    planned = find_plan(model, config)

    def total(s: int, r: int) -> int:
        sized = replaced(config, shared_dim=s, specific_dim=r)
        return sum(math.prod(shape) for shape in planned.tensor_shapes(sized).values())

    smallest = total(1, 0)
    if parameters < smallest:
        raise ValueError(
            f"parameters={parameters:,} are too few: the smallest adapter of these {len(planned.names)} layers has "
            f"{smallest:,}, one shared unit a shape"
        )
    # The total is a constant (biases) and so much for each unit.
    shared, specific = total(2, 0) - smallest, total(1, 1) - smallest
    left = parameters - (smallest - shared)
    r = config.specific_dim * left // (config.specific_dim * specific + config.shared_dim * shared)
    if config.transform != "both" and config.specific_dim and left >= specific:
        r = max(r, 1)  # two stages keep their proportion: "vtab" trains its shared units alone
    return replaced(config, shared_dim=(left - r * specific) // shared, specific_dim=r)
