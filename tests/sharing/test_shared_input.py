"""Layers that read one input hand it on, and their gradients are those of layers that do not."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genft_kernels import GenFTConfig, GenFTLinear, apply_genft, backends
from genft_kernels.sharing import shared_input
from tests.helpers.adapted_models import adapted, assert_close, gradients
from tests.helpers.tiny_models import Encoder, FusedEncoder, GroupedQueryBlock
from tests.sharing.test_group_contexts import Checkpointed


class CrossAttention(nn.Module):
    """Queries read one input, keys and values another."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, tokens):
        x = self.embedding(tokens)
        return F.scaled_dot_product_attention(self.q_proj(torch.tanh(x)), self.k_proj(x), self.v_proj(x))


class ChangesItsInput(CrossAttention):
    """The input changes in place between two readers."""

    def forward(self, tokens):
        x = self.embedding(tokens) * 1
        y = self.q_proj(x.clone()) + self.k_proj(x).sin()
        return y + self.v_proj(x.mul_(2)).cos()


MODELS = {
    "encoder": (Encoder, {}),
    "tiled": (Encoder, dict(outer_activation="gelu", bias=True)),
    "dropout": (Encoder, dict(dropout=0.3)),
    "fused": (FusedEncoder, dict(fused_blocks={"qkv": (3, (0, 2))})),
    "grouped-query": (GroupedQueryBlock, dict(target_modules=["q_proj", "k_proj", "v_proj", "up_proj"])),
    "cross-attention": (CrossAttention, dict(target_modules=["q_proj", "k_proj", "v_proj"])),
}
every_model = pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
TOKENS = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(1))


def input_gradients_wanted(model):
    model.embedding.weight.requires_grad_(True)
    return model.train()


def train(model) -> dict:
    """Gradients of a second step: the first one learns who reads after whom."""
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(5)
        model(TOKENS).square().sum().backward()
    return gradients(model)


def unshared(monkeypatch, model) -> dict:
    with monkeypatch.context() as patch:
        patch.setattr(shared_input, "receive", lambda layer, x, dtype: x)
        return train(model)


def forwarded(model, *layers):
    """The layers' outputs in one forward of `model`."""
    outputs = {}
    handles = [layer.register_forward_hook(lambda m, _, y: outputs.__setitem__(m, y)) for layer in layers]
    model(TOKENS)
    for handle in handles:
        handle.remove()
    return [outputs[layer] for layer in layers]


def reads_from(output, other) -> bool:
    return any(parent is other.grad_fn for parent, _ in output.grad_fn.next_functions)


@every_model
@pytest.mark.parametrize("adding", [("eager",), ()], ids=["in-the-product", "apart"])
def test_gradients_are_those_of_layers_on_their_own(make, settings, adding, monkeypatch):
    monkeypatch.setattr(backends, "ADDING_BACKENDS", adding)
    model = input_gradients_wanted(adapted(make, settings))
    assert_close(train(model), unshared(monkeypatch, model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_under_autocast(dtype, monkeypatch):
    model = input_gradients_wanted(adapted(dtype=torch.float32))
    exact = train(model)
    forward = model.forward
    model.forward = lambda tokens: torch.autocast("cpu", dtype)(forward)(tokens).float()
    ours, plain = train(model), unshared(monkeypatch, model)
    for name, gradient in exact.items():
        error, allowed = (ours[name] - gradient).norm(), (plain[name] - gradient).norm()
        assert error <= 2 * allowed + 1e-3 * gradient.norm(), name


def test_the_second_reader_reads_from_the_first_once_it_is_known():
    model = input_gradients_wanted(adapted())
    query, value = model.layers[1].attention.query, model.layers[1].attention.value
    first, second = forwarded(model, query, value)
    assert not reads_from(second, first)
    for _ in range(2):
        first, second = forwarded(model, query, value)
        assert reads_from(second, first) and not reads_from(first, second)


def test_readers_of_another_input_are_left_alone():
    settings = dict(target_modules=["q_proj", "k_proj", "v_proj"])
    model = input_gradients_wanted(adapted(CrossAttention, settings))
    for _ in range(2):
        q, k, v = forwarded(model, model.q_proj, model.k_proj, model.v_proj)
    assert not reads_from(k, q) and reads_from(v, k)


def test_an_input_that_changed_in_between_is_read_anew(monkeypatch):
    settings = dict(target_modules=["q_proj", "k_proj", "v_proj"])
    model = adapted(ChangesItsInput, settings).requires_grad_(False)  # else x is saved, and autograd forbids the change
    input_gradients_wanted(model)
    assert_close(train(model), unshared(monkeypatch, model))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_with_checkpointing(reentrant, monkeypatch):
    model = input_gradients_wanted(adapted(partial(Encoder, layers=4)))
    expected = unshared(monkeypatch, model)
    region = Checkpointed(model, reentrant)
    region.model.embedding.register_forward_hook(lambda *_: _[-1] * 1)
    actual = train(region)
    assert_close({name.removeprefix("model."): grad for name, grad in actual.items()}, expected)


# --- layers by hand -------------------------------------------------------------------------------------------------


def two_layers():
    torch.manual_seed(3)
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("q_proj", "v_proj")}).double()
    apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1, zero_delta=False))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        model["v_proj"](model["q_proj"](x) * 0 + x)
        model["q_proj"](x), model["v_proj"](x)
    return model["q_proj"], model["v_proj"], x


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-first", "second-first"])
def test_losses_apart(order):
    q, v, x = two_layers()
    expected = torch.autograd.grad((q(x).square() + v(x).square()).sum(), [x, q.specific_up, v.specific_up])
    losses = [layer(x).square().sum() for layer in (q, v)]
    for index in order:
        losses[index].backward()
    for actual, wanted in zip((x.grad, q.specific_up.grad, v.specific_up.grad), expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-12)


def test_repeated_forwards_of_one_input_do_not_hang_together():
    q, v, x = two_layers()
    nodes = []
    for _ in range(4):
        q(x)
        nodes.append(weakref.ref(v(x).grad_fn))
    gc.collect()
    assert all(node() is None for node in nodes[:-1])
    for _ in range(3):
        x.grad = None
        (q(x) + v(x)).sum().backward()
        assert torch.allclose(x.grad, (q.weight + q.delta_weight() + v.weight + v.delta_weight()).sum(0).expand(3, 6))


def test_nothing_of_a_finished_forward_is_held():
    q, v, x = two_layers()
    node = weakref.ref(q(x).grad_fn)
    gc.collect()
    assert node() is not None  # until the next reader has come
    v(x)
    gc.collect()
    assert node() is None


def test_an_input_without_gradient_is_not_handed_on():
    q, v, x = two_layers()
    for _ in range(2):
        first, second = q(x.detach()), v(x.detach())
        assert not reads_from(second, first)
    fused = GenFTLinear(6, 6, config=GenFTConfig(shared_dim=2)).double()
    fused(x.detach()).sum().backward()
    assert fused.generator.row_up.grad is not None
