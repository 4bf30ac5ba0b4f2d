"""The models and settings that adapting, merging and undoing are tested on."""

from __future__ import annotations

import pytest

from genft_kernels import GenFTConfig, apply_genft
from tests.helpers.tiny_models import (
    Encoder,
    FusedEncoder,
    FusedGroupedQueryBlock,
    GroupedQueryBlock,
    TiedModel,
    randomise,
)


def config(**settings) -> GenFTConfig:
    return GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, "inner_activation": "tanh", **settings})


FUSED = dict(fused_blocks={"qkv": (3, (0, 2))})
UNEQUAL = dict(fused_blocks={"qkv_proj": ((8, 4, 4), (0, 2))})
RECTANGULAR = dict(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], outer_activation="gelu")
SHARED = dict(target_modules=["first", "second", "head"])
SAVED = dict(modules_to_save=["classifier", "norm"], target_modules=r"layers\.\d\.attention\.\w+")
MODELS = {
    "encoder": (Encoder, {}),
    "encoder-modules_to_save": (Encoder, SAVED),
    "encoder-dropout": (Encoder, dict(dropout=0.2)),
    "fused": (FusedEncoder, FUSED),
    "fused-unequal": (FusedGroupedQueryBlock, UNEQUAL),
    "grouped-query": (GroupedQueryBlock, RECTANGULAR),
    "tied-and-shared": (TiedModel, SHARED),
}
every_model = pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)


def adapted(make=Encoder, settings=None, **more):
    """An evaluating model with an update that is not zero."""
    return randomise(apply_genft(make().eval(), config(**(settings or {}), **more)))
