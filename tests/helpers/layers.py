"""GenFTLinear layers in every setting, with updates that are not zero."""

from __future__ import annotations

import pytest
import torch

from genft_kernels import GenFTConfig, GenFTLinear
from tests.helpers.tiny_models import randomise

CONFIGS = {
    "factored": (9, 9, dict(inner_activation="tanh")),
    "tiled-bias": (9, 9, dict(outer_activation="leaky_relu", bias=True)),
    "out_in": (9, 9, dict(delta_layout="out_in", inner_activation="gelu", bias=True)),
    "untied": (9, 9, dict(tie_specific=False, outer_activation="silu")),
    "wide": (12, 7, dict(inner_activation="silu")),
    "tall-tiled": (7, 12, dict(outer_activation="tanh", weight_ratio="rms", ratio_scope="all")),
    "column": (12, 7, dict(transform="column", bias=True)),
    "column-square": (9, 9, dict(transform="column", outer_activation="gelu")),
    "row": (7, 12, dict(transform="row", bias=True, weight_ratio="rms")),
    "sum": (7, 12, dict(transform="sum", bias=True, outer_activation="tanh")),
    "shared-only": (12, 7, dict(specific_dim=0)),
    "specific-only": (9, 9, dict(shared_dim=0, specific_dim=3)),
    "dropout": (9, 9, dict(dropout=0.2)),
}
every_config = pytest.mark.parametrize("inputs, outputs, settings", CONFIGS.values(), ids=CONFIGS)


def config(**settings) -> GenFTConfig:
    return GenFTConfig(**{"shared_dim": 3, "specific_dim": 2, "zero_delta": False, **settings})


def make_layer(inputs=9, outputs=9, settings=None, dtype=torch.float64, **options) -> GenFTLinear:
    return randomise(GenFTLinear(inputs, outputs, config=config(**(settings or {})), dtype=dtype, **options))


def train_step(layer, x):
    """The gradient of everything that can have one."""
    x = x.clone().requires_grad_(True)
    layer(x).square().sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.requires_grad}}
