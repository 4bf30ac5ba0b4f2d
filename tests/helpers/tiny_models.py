"""Tiny hand-written models for the tests of the upper layers, and how to compare two states of one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genft_kernels import GenFTLinear

VOCABULARY = 20


class Attention(nn.Module):
    """One head; q and k may be narrower or wider than the model."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)

    def forward(self, x):
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim)
        self.norm = nn.LayerNorm(dim)
        self.dense = nn.Linear(dim, dim)

    def forward(self, x):
        return self.norm(x + self.dense(torch.tanh(self.attention(x))))


class Encoder(nn.Module):
    """A stack of layers with query and value, and a classifier with a BatchNorm in it."""

    def __init__(self, layers: int = 2, dim: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(layers))
        self.classifier = nn.Sequential(nn.BatchNorm1d(dim), nn.Linear(dim, classes))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


class FusedEncoder(nn.Module):
    """A block whose query, key and value are one linear layer."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens):
        return self.proj(F.scaled_dot_product_attention(*self.qkv(self.embedding(tokens)).chunk(3, -1)))


class GroupedQueryBlock(nn.Module):
    """Rectangular weights: two query heads over one head of keys and values, and an MLP."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim // 2, bias=False)
        self.v_proj = nn.Linear(dim, dim // 2, bias=False)
        self.up_proj = nn.Linear(dim, 3 * dim)
        self.down_proj = nn.Linear(3 * dim, dim)

    def forward(self, tokens):
        x = self.embedding(tokens)
        keys, values = self.k_proj(x), self.v_proj(x)
        heads = [F.scaled_dot_product_attention(q, keys, values) for q in self.q_proj(x).chunk(2, -1)]
        x = x + torch.cat(heads, -1)
        return x + self.down_proj(F.silu(self.up_proj(x)))


class FusedGroupedQueryBlock(nn.Module):
    """The same attention with q, k and v as one linear layer: 8, 4 and 4 rows."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.qkv_proj = nn.Linear(dim, 2 * dim)

    def forward(self, tokens):
        q, k, v = self.qkv_proj(self.embedding(tokens)).tensor_split((8, 12), -1)
        return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.chunk(2, -1)], -1)


class TiedModel(nn.Module):
    """A head that shares its weight with the embedding, and one linear layer under two names."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.first = nn.Linear(dim, dim)
        self.second = self.first
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.embedding(tokens))))))


class Wrapper(nn.Module):
    """As torch.compile's: it answers for the module that it wraps, under other names."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "wrapped" else getattr(self.wrapped, name)


def tokens(batch: int = 4, length: int = 5) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Give everything that trains random values, so that no update is zero."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=scale)
    return module


def train_steps(model: nn.Module, steps: int, rate: float = 0.01) -> list[float]:
    """The losses of a few steps towards an output of ones."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=rate), []
    for _ in range(steps):
        loss = (model(tokens()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(model: nn.Module) -> dict:
    """All that adapting could disturb: values, bits and order, identities, classes, flags and attributes."""
    parameters, buffers = (dict(f(remove_duplicate=False)) for f in (model.named_parameters, model.named_buffers))
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "keys": list(model.state_dict()),
        "bits": {name: _bits(tensor) for name, tensor in (parameters | buffers).items()},
        "identities": {name: id(value) for name, value in (parameters | buffers | modules).items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(set(vars(module)) - {"enabled"}) for name, module in modules.items()},
        "enabled": {name: m.enabled for name, m in modules.items() if isinstance(m, GenFTLinear)},
    }


def _bits(tensor: torch.Tensor) -> tuple:
    contents = tensor.detach().contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []
    return tensor.dtype, tuple(tensor.shape), contents
