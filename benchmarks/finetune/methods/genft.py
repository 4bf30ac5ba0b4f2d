"""GenFT with this package's presets, sized to the budget, and with the official one of the domain, as published."""

import dataclasses
from typing import Any

from torch import nn

from genft_kernels import GenFTConfig, apply_genft

from ..tasks.problem import Problem
from .method import Adapt, Method


def sized(preset: str, **overrides: Any) -> Adapt:
    """A preset with as many units as the budget pays for."""

    def adapt(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
        scaling = scale * GenFTConfig.preset(preset).scaling
        places = problem.places.of_config()
        config = GenFTConfig.for_budget(model, size, preset=preset, scaling=scaling, **places, **overrides)
        return apply_genft(model, config)

    return adapt


def official(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """The official preset of the problem's domain, whatever the budget, in its layout where weights are square."""
    preset = GenFTConfig.preset(problem.official, **problem.places.of_config())
    square = all(linear.in_features == linear.out_features for linear in problem.places.linears(model))
    layout = preset.delta_layout if square else "in_out"
    return apply_genft(model, dataclasses.replace(preset, scaling=scale * preset.scaling, delta_layout=layout))


FAST = Method("GenFT fast (column stage)", sized("fast"))
WEGEFT = Method("GenFT wegeft (column stage, all units shared)", sized("wegeft"))
ROW = Method("GenFT row stage, as fast", sized("fast", transform="row"))
FAST_BOTH = Method("GenFT fast-both (factored form)", sized("fast-both"))
TILED = Method("GenFT fast-both, leaky_relu (tiled form)", sized("fast-both", outer_activation="leaky_relu"))
OFFICIAL = Method("GenFT, official preset", official, rates=(2.5e-3, 5e-3, 1e-2), sized=False)
