"""GenFTLinear copied, saved, cast, under autocast, scaled and recomputed: the same layer in every state."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genft_kernels import GenFTLinear
from tests.helpers.layers import config, every_config, make_layer, train_step
from tests.helpers.tiny_models import randomise


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("origin", ["constructed", "from_linear"])
def test_copy_is_equal_and_independent(copied, merged, origin):
    layer = make_layer()
    if origin == "from_linear":
        layer = GenFTLinear.from_linear(nn.Linear(9, 9, dtype=torch.float64), layer.generator)
    x, frozen = torch.randn(2, 9, dtype=torch.float64), layer.weight.clone()
    if merged:
        layer.eval().merge()
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x)) and twin.merged == merged and twin.config == layer.config
    before = layer(x)
    randomise(twin, scale=1.0)
    assert torch.equal(layer(x), before)
    if merged:
        twin.unmerge()
    assert torch.equal(twin.weight, frozen) and not twin.weight.requires_grad
    assert not torch.equal(twin(x), before)


def test_state_dict_round_trip():
    layer, other = make_layer(12, 7), make_layer(12, 7)
    x = torch.randn(2, 12, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_reset_parameters_draws_everything_anew():
    layer = GenFTLinear(9, 9, config=config(zero_delta=True), device="meta").to_empty(device="cpu")
    for module in layer.modules():  # as FSDP does with modules made on the meta device
        module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer.weight.any() and layer.specific_down.any() and not layer.specific_up.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_casts_everything(dtype):
    layer = make_layer(dtype=torch.float32).to(dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    layer(torch.randn(2, 9, dtype=dtype)).sum().backward()
    assert layer.specific_down.grad.dtype == layer.generator.row_up.grad.dtype == dtype
    assert make_layer(dtype=torch.float32).double()(torch.randn(2, 9, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_parameters_are_float32_over_16_bits(dtype):
    layer = make_layer(dtype=dtype, settings=dict(bias=True))
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert len(trained) == 10 and {p.dtype for p in trained.values()} == {torch.float32}
    x = torch.randn(3, 9, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype and {p.grad.dtype for p in trained.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_config
def test_autocast_equals_casting_by_hand(inputs, outputs, settings, dtype):
    if settings.get("weight_ratio") == "rms":
        settings = settings | {"weight_ratio": 2.0}  # the mean square of the rounded weight is another one
    layer = make_layer(inputs, outputs, settings, dtype=torch.float32)
    by_hand = copy.deepcopy(layer)
    by_hand.weight, by_hand.bias = (nn.Parameter(t.to(dtype), False) for t in (layer.weight, layer.bias))
    x = torch.randn(6, inputs)
    grad = torch.randn(6, outputs).to(dtype)
    cast = x.to(dtype).requires_grad_(True)
    x.requires_grad_(True)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    y.backward(grad)
    torch.manual_seed(3)
    expected = by_hand(cast)
    expected.backward(grad)
    assert y.dtype == dtype and torch.equal(y, expected)
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad.to(dtype), cast.grad)
    for (name, ours), theirs in zip(layer.named_parameters(), by_hand.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad
        assert not ours.requires_grad or torch.equal(ours.grad, theirs.grad), name


def test_grad_scaler_in_fp16():
    def gradients(scale: float, dtype: torch.dtype):
        torch.manual_seed(5)
        layer = randomise(GenFTLinear(16, 16, config=config(inner_activation="tanh")))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer(torch.randn(64, 16))
        scaler.scale(y.float().mul(1e-6).square().mean()).backward()  # below fp16's range without the scale
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale(), {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}

    scale, scaled = gradients(2.0**36, torch.float16)
    _, unscaled = gradients(1.0, torch.float16)
    _, exact = gradients(1.0, torch.float32)
    assert scale == 2.0**36  # nothing overflowed
    for name, gradient in exact.items():
        assert (scaled[name] - gradient).norm() < 0.01 * gradient.norm(), name
        assert (unscaled[name] - gradient).norm() > 0.5 * gradient.norm(), name


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_checkpointing_repeats_dropout_and_rounding(reentrant, dtype):
    layer = make_layer(settings=dict(dropout=0.3, outer_activation="gelu"), dtype=dtype)
    plain, recomputed = copy.deepcopy(layer), copy.deepcopy(layer)
    recomputed.forward = lambda x: checkpoint(layer.__class__.forward, recomputed, x, use_reentrant=reentrant)
    x = torch.randn(8, 9, dtype=dtype)
    torch.manual_seed(2)
    expected = train_step(plain, x)
    torch.manual_seed(2)
    actual = train_step(recomputed, x)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    other = train_step(copy.deepcopy(layer), x)
    assert not torch.equal(other["x"], expected["x"])  # another mask is another result
