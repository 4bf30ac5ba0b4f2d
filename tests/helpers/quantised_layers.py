"""Quantised layers for tests that no library is needed for, and a model over them beside its dense twin."""

from __future__ import annotations

import copy
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, register_frozen_weight
from tests.helpers.tiny_models import Encoder

TOKENS = torch.arange(12).reshape(3, 4)


class Int8Linear(nn.Module):
    """W in bytes, with a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.out_features, self.in_features = weight.shape
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, _values(self).to(x.dtype), self.bias)


class Unreadable(Int8Linear):
    """One whose kernels alone can read it."""


def _values(layer: Int8Linear) -> torch.Tensor:
    return layer.codes * layer.scale


class Dequantisations:
    """The reader of `Int8Linear` for `register_frozen_weight`: counts its calls, and what it made and who keeps it."""

    def __init__(self) -> None:
        self.count, self.made = 0, []

    def __call__(self, layer: Int8Linear) -> torch.Tensor:
        self.count += 1
        weight = _values(layer)
        self.made.append(weakref.ref(weight.untyped_storage()))
        return weight

    def alive(self) -> int:
        """How many of the dense matrices there still are."""
        return sum(reference() is not None for reference in self.made)


def registered() -> Dequantisations:
    """`Int8Linear` registered anew."""
    dequantisations = Dequantisations()
    register_frozen_weight(Int8Linear, dense=dequantisations)
    return dequantisations


def quantised(model: nn.Module, names=("query", "key", "value", "dense")) -> nn.Module:
    """`model` with `Int8Linear` for all its layers of those names."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Int8Linear(module))
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy of a model with plain layers over the same values in the place of quantised ones."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if isinstance(module, Int8Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dtype = plain.weight.dtype if module.bias is None else module.bias.dtype
            plain.weight = nn.Parameter(_values(module).to(dtype), requires_grad=False)
            plain.bias = module.bias
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, plain)
    return twin


def pair(config: GenFTConfig, dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Module, nn.Module]:
    """(an adapted quantised model, its adapted dense twin), with the same units, which are not the initial ones."""
    torch.manual_seed(0)
    model = quantised(Encoder(**options).to(dtype))
    twin = dense_twin(model)
    apply_genft(model, config)
    apply_genft(twin, config)
    share_units(model, twin)
    return model, twin


@torch.no_grad()
def share_units(model: nn.Module, twin: nn.Module) -> None:
    """Give what trains in both models the same random values."""
    mine = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn_like(parameter) * 0.2)
            mine[name].copy_(parameter)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of what trains, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def config(**settings) -> GenFTConfig:
    return GenFTConfig(**{"shared_dim": 3, "specific_dim": 2, "zero_delta": False, **settings})


def step(model, tokens=TOKENS):
    """(the output, gradients by name) of a training step."""
    torch.manual_seed(1)
    model.zero_grad()
    y = model.train()(tokens)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return y, gradients(model)


def assert_same(model, twin):
    (y, mine), (expected, theirs) = step(model), step(twin)
    assert torch.equal(y, expected)
    assert set(mine) == set(theirs) and mine
    assert {name for name in mine if not torch.equal(mine[name], theirs[name])} == set()
