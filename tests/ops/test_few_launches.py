"""Few launches for the generation of many layers, and little Python for each, give the same results."""

from types import SimpleNamespace

import pytest
import torch
from torch.linalg import vector_norm

from genft_kernels import GenFTConfig, GenFTLinear
from genft_kernels.backends.eager import operations as eager
from genft_kernels.backends.eager import thin
from genft_kernels.update import norms_of
from tests.helpers.cases import relative_error

LAYERS, OUT, IN, K = 5, 7, 11, 3


@pytest.mark.parametrize("biased", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
@pytest.mark.parametrize("together", [2, 4, 5, 100])
def test_weights_side_by_side_give_what_each_alone_does(together, transposed, biased, monkeypatch):
    weights = [torch.randn(IN, OUT).t() if transposed else torch.randn(OUT, IN) for _ in range(LAYERS)]
    down, bias = torch.randn(LAYERS, K, IN, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    down_bias = bias if biased else None
    grad = torch.randn(LAYERS, OUT, K, dtype=torch.float64)
    alone = (
        *eager.column(weights, down, down_bias, "tanh"),
        *eager.column_backward(grad, weights, grad, "tanh", [True, biased]),
    )
    monkeypatch.setattr(thin, "_together", lambda *_: together)
    batched = (
        *eager.column(weights, down, down_bias, "tanh"),
        *eager.column_backward(grad, weights, grad, "tanh", [True, biased]),
    )
    for one, other in zip(alone, batched, strict=True):
        assert (one is None and other is None) or relative_error(other, one) < 1e-14
    expected = torch.stack([w.double() @ a.T for w, a in zip(weights, down, strict=True)])
    assert relative_error(batched[1], expected + (bias if biased else 0)) < 1e-14


def test_small_weights_on_a_gpu_stand_together_and_no_others():
    def together(size, device, dtype=torch.bfloat16):
        of_device = SimpleNamespace(dtype=torch.bfloat16, device=torch.device(device))
        return thin._together(torch.empty(size, size, device="meta", dtype=dtype), of_device)

    assert together(768, "cpu") == 1
    assert together(768, "cuda") >= 24 and together(4096, "cuda") == 2 and together(8192, "cuda") == 0
    assert together(4096, "cuda", torch.float32) == 1  # under autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms_of_several_are_each_ones(dtype):
    weights = [torch.randn(6, 4).to(dtype), torch.zeros(6, 4, dtype=dtype), torch.randn(4, 6).to(dtype).t()]
    wide = torch.promote_types(dtype, torch.float32)
    norms = norms_of(weights)
    assert norms.dtype == wide
    assert relative_error(norms, torch.stack([vector_norm(w, dtype=wide) for w in weights])) < 1e-6


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
def test_norms_of_large_weights_have_all_digits(transposed, count):
    weight = torch.randn(1500, 1024)
    weight = weight.t() if transposed else weight
    assert relative_error(norms_of([weight] * count), weight.double().norm().expand(count)) < 1e-6


def test_what_a_transform_has_left_behind_is_taken_as_it_is():
    """A layer's node does not look for it, as `torch.autograd.Function` does."""
    left = []

    def keep(x):
        left.append(x * 2)
        return x.sum()

    torch.func.grad(keep)(torch.arange(12.0).reshape(2, 6))
    layer = GenFTLinear(6, 4, config=GenFTConfig(shared_dim=2, specific_dim=1, zero_delta=False))
    (dead,) = left
    plain = 2 * torch.arange(12.0).reshape(2, 6)
    results = []
    for x in (plain, dead):
        layer.zero_grad()
        for _ in range(2):  # both roads
            y = layer(x)
            y.sum().backward()
        results.append([y, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
