"""Layers whose weight is stored quantised, by layers of the tests' own: no library is needed."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genft_kernels import (
    accumulate,
    apply_genft,
    explain,
    register_frozen_weight,
)
from tests.helpers.quantised_layers import (
    TOKENS,
    Int8Linear,
    assert_same,
    config,
    dense_twin,
    gradients,
    pair,
    quantised,
    step,
)

FORMS = {
    "factored": {},
    "tiled": {"outer_activation": "gelu"},
    "dropout": {"dropout": 0.2},
    "biases": {"bias": True, "inner_activation": "tanh"},
    "rms": {"weight_ratio": "rms"},
    "column": {"transform": "column"},
    "row": {"transform": "row"},
    "sum": {"transform": "sum"},
    "out-in": {"delta_layout": "out_in"},
}


@pytest.mark.parametrize("form", FORMS)
def test_quantised_layer_is_the_one_over_the_dequantised_weight(form):
    assert_same(*pair(config(**FORMS[form])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["factored", "tiled"])
def test_quantised_layer_is_the_same_in_every_dtype(form, dtype):
    assert_same(*pair(config(**FORMS[form]), dtype))


def test_quantised_layer_is_the_same_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(*pair(config()))


def test_quantised_layer_is_the_same_by_the_reference():
    torch.manual_seed(0)
    linear = quantised(nn.Sequential(nn.Linear(6, 5)), names=("0",))
    twin = dense_twin(linear)
    for model in (linear, twin):
        torch.manual_seed(3)
        apply_genft(model, config(target_modules=["0"]), backend="reference")
    x = torch.randn(3, 6)
    assert torch.equal(linear(x), twin(x))


def test_fused_blocks_of_a_quantised_layer():
    torch.manual_seed(0)
    model = quantised(nn.Sequential(nn.Linear(6, 18), nn.Linear(18, 6)), names=("0", "1"))
    twin = dense_twin(model)
    for each in (model, twin):
        torch.manual_seed(3)
        apply_genft(each, config(target_modules=["0"], fused_blocks={"0": (3, (0, 2))}))
    x = torch.randn(3, 6)
    y, expected = model(x), twin(x)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y, expected)
    mine, theirs = gradients(model), gradients(twin)
    assert all(torch.equal(mine[name], grad) for name, grad in theirs.items()) and mine


def test_input_gets_its_gradient_through_blocks_that_are_not_adapted():
    torch.manual_seed(0)
    layer = quantised(nn.Sequential(nn.Linear(6, 18)), names=("0",))
    twin = dense_twin(layer)
    for each in (layer, twin):
        torch.manual_seed(3)
        apply_genft(each, config(target_modules=["0"], fused_blocks={"0": (3, (1,))}))
    x = torch.randn(3, 6, requires_grad=True)
    (mine,) = torch.autograd.grad(layer(x)[:, :6].square().sum(), x)
    (expected,) = torch.autograd.grad(twin(x)[:, :6].square().sum(), x)
    assert torch.equal(mine, expected)


@pytest.mark.parametrize("form", FORMS)
def test_dequantisations_of_a_step_are_four_a_layer_at_most(form, dequantisations):
    model, _ = pair(config(**FORMS[form]), layers=2)
    dequantisations.count = 0
    step(model)
    # A stage's and the layer's own, forward and backward. The lowest layer's input wants no gradient, and query and
    # value of a layer are adapted.
    # Both stages of a sum have one dense W between them.
    assert 3 * 4 <= dequantisations.count <= 4 * 4


def test_dequantisations_are_two_where_the_generation_is_kept(dequantisations):
    model, _ = pair(config())
    with accumulate(model):
        step(model)
        dequantisations.count = 0
        step(model)
        assert dequantisations.count <= 2 * 4


def test_dequantisations_are_one_in_evaluation(dequantisations):
    model, _ = pair(config())
    model.eval()
    with torch.no_grad():
        model(TOKENS)
        dequantisations.count = 0
        model(TOKENS)
    assert dequantisations.count == 4


def test_quantised_layers_are_generated_together():
    assert "4 layers on cpu in one generation" in explain(pair(config())[0])


@pytest.mark.parametrize("form", ["factored", "tiled", "dropout", "rms", "sum"])
def test_nothing_of_the_weights_size_is_kept(form, dequantisations):
    torch.manual_seed(0)
    model = quantised(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), names=("0", "1"))
    apply_genft(model, config(target_modules=["0", "1"], **FORMS[form]))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = model(torch.randn(3, 64, requires_grad=True))
    gc.collect()
    assert dequantisations.alive() == 0
    assert saved and max(saved) < 64 * 64
    y.sum().backward()
    gc.collect()
    assert dequantisations.alive() == 0


@pytest.mark.parametrize("form", ["factored", "sum"])
def test_one_weight_is_dense_at_a_time(form, dequantisations):
    model, _ = pair(config(**FORMS[form]), layers=3)
    alive = []
    make = dequantisations.__class__.__call__

    def watched(layer):
        alive.append(dequantisations.alive())
        return make(dequantisations, layer)

    register_frozen_weight(Int8Linear, dense=watched)
    step(model)
    assert max(alive) <= 1  # the one before goes as the next one comes


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_quantised_layers_have_the_same_gradients(reentrant, dequantisations):
    torch.manual_seed(0)
    model = quantised(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), names=("0", "1"))
    apply_genft(model, config(target_modules=["0", "1"], outer_activation="tanh"))
    x = torch.randn(3, 8, requires_grad=True)
    model(x).square().sum().backward()
    expected = gradients(model)
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.zero_grad()
    y = checkpoint(model, x, use_reentrant=reentrant)
    gc.collect()
    assert dequantisations.alive() == 0
    y.square().sum().backward()
    assert all(torch.allclose(grad, expected[name], rtol=1e-5, atol=1e-7) for name, grad in gradients(model).items())


def test_flop_counters_see_quantised_layers():
    from torch.utils.flop_counter import FlopCounterMode

    model, twin = pair(config())
    counts = []
    for each in (model, twin):
        with FlopCounterMode(display=False) as counter:
            step(each)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("form", ["factored", "tiled"])
def test_quantised_model_compiles_to_one_graph(form):
    model, _ = pair(config(**FORMS[form]))
    y, expected = step(model)
    expected = {name: grad.clone() for name, grad in expected.items()}
    compiled, grads = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert torch.allclose(compiled, y, atol=1e-6)
    assert all(torch.allclose(grads[f"_orig_mod.{name}"], grad, atol=1e-6) for name, grad in expected.items())
