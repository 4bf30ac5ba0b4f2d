"""Adapted models for the tests of grouped generation, and their gradients."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genft_kernels import GenFTConfig, apply_genft
from genft_kernels.sharing.cache import LayerGroup
from tests.helpers.tiny_models import Encoder, randomise, tokens

DROPOUT = dict(dropout=0.3)


class Checkpointed(nn.Module):
    """An encoder of which every block of layers is recomputed in backward."""

    def __init__(self, model: Encoder, reentrant: bool, layers_per_block: int = 2) -> None:
        super().__init__()
        self.model, self.reentrant, self.size = model, reentrant, layers_per_block

    def forward(self, tokens):
        x = self.model.embedding(tokens).requires_grad_()  # as reentrant checkpointing asks
        for start in range(0, len(self.model.layers), self.size):
            block = nn.Sequential(*self.model.layers[start : start + self.size])
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.model.classifier(x.mean(1))


def adapted(make=Encoder, settings=None, dtype=torch.float64, **more):
    given = {"shared_dim": 2, "specific_dim": 1, "inner_activation": "tanh", **(settings or {}), **more}
    return randomise(apply_genft(make().to(dtype), GenFTConfig(**given)))


def groups(model) -> list[LayerGroup]:
    return [generator.group for generator in model.genft_generators.values()]


def generations(model) -> int:
    return sum(group.generations for group in groups(model))


def gradients(model) -> dict:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def assert_close(actual: dict, expected: dict, tolerance=1e-12):
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert gradient is not None and actual[name] is not None, name
        assert torch.allclose(actual[name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max()), name


def loss_of(model):
    return model(tokens()).square().sum()


def train(model, seed=5) -> dict:
    torch.manual_seed(seed)
    loss_of(model).backward()
    return gradients(model)


def one_by_one(model):
    """The same model, each layer generated alone."""
    twin = copy.deepcopy(model)
    for group in groups(twin):
        group.together_with = lambda layer, source: {layer: source}
    return twin
