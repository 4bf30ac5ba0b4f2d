"""Layers whose weight is stored quantised, by layers of the tests' own: no library is needed."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from genft_kernels import (
    GenFTConfig,
    GenFTGenerator,
    GenFTLinear,
    accumulate,
    apply_genft,
    disabled,
    explain,
    export_lora,
    load_adapter,
    merge,
    refresh,
    register_frozen_weight,
    remove_genft,
    save_adapter,
)
from tests.helpers.quantised_layers import (
    Int8Linear,
    Unreadable,
    dense_twin,
    gradients,
    pair,
    quantised,
    registered,
)
from tests.helpers.tiny_models import Encoder

TOKENS = torch.arange(12).reshape(3, 4)


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


@pytest.fixture(autouse=True)
def dequantisations():
    return registered()


FORMS = {
    "factored": {},
    "tiled": {"outer_activation": "gelu"},
    "dropout": {"dropout": 0.2},
    "biases": {"bias": True, "inner_activation": "tanh"},
    "rms": {"weight_ratio": "rms"},
    "column": {"transform": "column"},
    "row": {"transform": "row"},
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


# --- how often, and what is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_dequantisations_of_a_step_are_four_at_most(form, dequantisations):
    model, _ = pair(config(**FORMS[form]), layers=2)
    dequantisations.count = 0
    step(model)
    # The lowest layer's input wants no gradient, and query and value of a layer are adapted.
    assert dequantisations.count <= 4 * 4
    assert dequantisations.count >= 3 * 4


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


@pytest.mark.parametrize("form", ["factored", "tiled", "dropout", "rms"])
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


def test_one_weight_is_dense_at_a_time(dequantisations):
    model, _ = pair(config(), layers=3)
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

    import genft_kernels.flops  # noqa: F401  # a counter knows what was known when it was made

    model, twin = pair(config())
    counts = []
    for each in (model, twin):
        with FlopCounterMode(display=False) as counter:
            step(each)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# --- states ---------------------------------------------------------------------------------------------------------


def test_factors_follow_a_change_of_the_codes():
    model, _ = pair(config())
    model.eval()
    with torch.no_grad():
        model(TOKENS)
        model.layers[0].attention.query.base_layer.codes.neg_()
        changed = model(TOKENS)
        refresh(model)
        assert torch.equal(model(TOKENS), changed)


def test_rms_follows_a_change_of_the_codes():
    model, _ = pair(config(weight_ratio="rms"))
    model.eval()
    with torch.no_grad():
        model(TOKENS)
        for layer in model.layers:
            layer.attention.value.base_layer.codes.div_(3, rounding_mode="trunc")
        twin = dense_twin(remove_genft(copy.deepcopy(model)))
        apply_genft(twin, config(weight_ratio="rms"))
        twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in twin.state_dict()}, strict=False)
        assert torch.equal(twin.eval()(TOKENS), model(TOKENS))


def test_disabled_is_the_quantised_model():
    torch.manual_seed(0)
    model = quantised(Encoder()).eval()
    expected = model(TOKENS)
    apply_genft(model, config())
    assert not torch.allclose(model(TOKENS), expected)
    with disabled(model):
        assert torch.equal(model(TOKENS), expected)


def test_removing_brings_the_quantised_layers_back():
    torch.manual_seed(0)
    model = quantised(Encoder()).eval()
    query, names, expected = model.layers[0].attention.query, list(model.state_dict()), model(TOKENS)
    apply_genft(model, config())
    remove_genft(model)
    assert model.layers[0].attention.query is query
    assert list(model.state_dict()) == names
    assert torch.equal(model(TOKENS), expected)


def test_merging_names_the_layer_and_the_way_out():
    model, _ = pair(config())
    for act in (merge, lambda m: remove_genft(m, keep_update=True)):
        with pytest.raises(
            RuntimeError, match=r"'layers.0.attention.query' is quantised \(Int8Linear.*dequantize=True"
        ):
            act(model)
    with pytest.raises(RuntimeError, match="dequantize=True"):
        model.layers[0].attention.query.merge()
    with pytest.raises(ValueError, match="needs keep_update=True"):
        remove_genft(model, dequantize=True)
    step(model)  # it is as it was


def test_removing_with_dequantize_leaves_dense_layers():
    model, twin = pair(config())
    model.eval(), twin.eval()
    expected = model(TOKENS)
    remove_genft(model, keep_update=True, dequantize=True)
    remove_genft(twin, keep_update=True)
    query = model.layers[0].attention.query
    assert type(query) is nn.Linear and query.weight.dtype == torch.float32
    assert isinstance(model.layers[0].attention.key, Int8Linear)
    assert torch.allclose(model(TOKENS), expected, atol=1e-5)
    assert torch.equal(query.weight, twin.layers[0].attention.query.weight)


def test_dense_layers_are_in_the_models_dtype():
    model, _ = pair(config(), torch.bfloat16)
    remove_genft(model, keep_update=True, dequantize=True)
    query = model.layers[0].attention.query
    assert query.weight.dtype == query.bias.dtype == torch.bfloat16
    model.eval()(TOKENS)


def test_a_copied_model_has_handles_of_its_own():
    model, _ = pair(config())
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.layers[0].attention.query.base_layer.codes.zero_()
    expected = pair(config())[0].eval()(TOKENS)
    assert torch.equal(other.eval()(TOKENS), expected)


# --- files ----------------------------------------------------------------------------------------------------------


def test_adapter_over_a_quantised_base_goes_through_files(tmp_path):
    model, _ = pair(config())
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    fresh = quantised(Encoder())
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(TOKENS), model.eval()(TOKENS))


def test_fingerprints_cover_the_stored_bytes(tmp_path):
    model, _ = pair(config())
    save_adapter(model, tmp_path)
    for change in ("codes", "scale"):
        torch.manual_seed(0)
        fresh = quantised(Encoder())
        tensor = getattr(fresh.layers[1].attention.value, change)
        with torch.no_grad():
            tensor.view(torch.uint8)[3, 0] ^= 1
        with pytest.raises(ValueError, match=r"weight of 'layers.1.attention.value': its quantised bytes differ"):
            load_adapter(fresh, tmp_path)
        assert isinstance(fresh.layers[1].attention.value, Int8Linear)


def test_adapter_of_a_quantised_base_is_refused_on_the_one_before(tmp_path):
    model, _ = pair(config())
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="belongs to another base model"):
        load_adapter(Encoder(), tmp_path)


def test_export_over_a_quantised_base_is_that_over_the_dense_one(tmp_path):
    from safetensors.torch import load_file

    for name, model in zip(("mine", "dense"), pair(config()), strict=True):
        export_lora(model, tmp_path / name)
    mine, dense = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mine", "dense"))
    assert set(mine) == set(dense)
    assert all(torch.allclose(mine[key], dense[key], rtol=1e-5, atol=1e-6) for key in mine)


# --- what is refused ------------------------------------------------------------------------------------------------


def named(module_name: str) -> nn.Module:
    """A layer whose class says that it comes from a library."""
    kind = type("QuantLinear", (Unreadable,), {"__module__": module_name, "forward": Unreadable.forward})
    return kind(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("library", "method"),
    [
        ("gptqmodel.nn_modules", "GPTQ"),
        ("auto_gptq.qlinear", "GPTQ"),
        ("awq.modules", "AWQ"),
        ("aqlm.inference", "AQLM"),
        ("eetq.modules", "EETQ"),
    ],
)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_kinds_without_a_way_to_dequantise_are_refused(library, method, targets, monkeypatch):
    from genft_kernels import frozen_weight

    monkeypatch.setattr(frozen_weight, "_registered", {})
    monkeypatch.setattr(frozen_weight, "_found", {})
    model = Encoder()
    model.layers[1].attention.query = named(library)
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match=rf"'layers.1.attention.query': QuantLinear cannot be adapted: {method}"):
        apply_genft(model, config(target_modules=targets))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda layer: None, "must become dense as a floating-point matrix"),
        (lambda layer: layer.codes, "got torch.int8"),
        (lambda layer: layer.scale[:, 0], r"of shape \(8,\)"),
        (lambda layer: [][0], "cannot be made dense: list index out of range"),
    ],
)
def test_a_weight_that_does_not_become_dense_is_refused_at_apply(made, message):
    register_frozen_weight(Int8Linear, dense=made)
    model = quantised(Encoder())
    with pytest.raises(TypeError, match=rf"'layers.0.attention.query': Int8Linear.*{message}"):
        apply_genft(model, config())
    assert isinstance(model.layers[0].attention.query, Int8Linear)


def test_a_quantised_weight_without_values_is_refused():
    model = quantised(Encoder())
    model.layers[0].attention.query.to("meta")
    with pytest.raises(ValueError, match="'layers.0.attention.query': Int8Linear is on the meta device"):
        apply_genft(model, config())


class Packed(torch.Tensor):
    """A weight of a class of its own that nothing is known of."""


def test_a_weight_of_an_unknown_class_is_refused_at_apply():
    model = Encoder()
    query = model.layers[0].attention.query
    query.weight = nn.Parameter(query.weight.data.as_subclass(Packed), requires_grad=False)
    with pytest.raises(TypeError, match="Linear of Packed cannot be adapted.*register_frozen_weight"):
        apply_genft(model, config())


def test_an_adapted_layer_is_not_quantised():
    register_frozen_weight(Packed, dense=lambda layer: layer.weight.as_subclass(torch.Tensor))
    model = apply_genft(Encoder(), config())
    query = model.layers[0].attention.query
    weight = query.weight
    with pytest.raises(TypeError, match="quantise the model first, then call apply_genft"):
        query.weight = nn.Parameter(weight.data.as_subclass(Packed), requires_grad=False)
    assert query.weight is weight


def test_a_kind_is_known_by_its_weights_class():
    register_frozen_weight("Packed", dense=lambda layer: layer.weight.as_subclass(torch.Tensor))
    torch.manual_seed(0)
    model = Encoder()
    query = model.layers[0].attention.query
    query.weight = nn.Parameter(query.weight.data.as_subclass(Packed), requires_grad=False)
    apply_genft(model, config())
    step(model)
    assert model.layers[0].attention.query.base_layer is query


def test_register_frozen_weight_refuses_what_means_every_layer():
    for kind in (nn.Linear, nn.Module, torch.Tensor, "Linear"):
        with pytest.raises(ValueError, match="layers of all kinds"):
            register_frozen_weight(kind, dense=lambda layer: layer.weight)
    with pytest.raises(TypeError, match="kind must be a type or str"):
        register_frozen_weight(3, dense=lambda layer: layer.weight)
    with pytest.raises(TypeError, match="dense must be a function"):
        register_frozen_weight(Int8Linear, dense=torch.ones(1))


def test_the_last_registration_counts():
    calls = []
    register_frozen_weight("Int8Linear", dense=lambda layer: calls.append(layer) or layer.codes * layer.scale)
    apply_genft(quantised(Encoder()), config())
    assert calls


def test_a_single_layer_can_be_adapted():
    layer = GenFTLinear.from_linear(Int8Linear(nn.Linear(6, 5)), GenFTGenerator(6, 5, config()))
    x = torch.randn(2, 6)
    weight = (layer.base_layer.codes * layer.base_layer.scale) + layer.delta_weight()
    assert torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-6)
    assert "Int8Linear" in repr(layer)


def test_the_layers_compute_dtype_is_kept():
    linear = Int8Linear(nn.Linear(6, 5))
    linear.compute_dtype = torch.bfloat16
    layer = GenFTLinear.from_linear(linear, GenFTGenerator(6, 5, config()))
    x = torch.randn(2, 6)
    y = layer(x)
    assert y.dtype == torch.float32
    del linear.compute_dtype
    assert torch.equal(y, layer(x.bfloat16()).float())


@pytest.mark.parametrize("form", ["factored", "tiled"])
def test_quantised_model_compiles_to_one_graph(form):
    model, _ = pair(config(**FORMS[form]))
    y, expected = step(model)
    expected = {name: grad.clone() for name, grad in expected.items()}
    compiled, grads = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert torch.allclose(compiled, y, atol=1e-6)
    assert all(torch.allclose(grads[f"_orig_mod.{name}"], grad, atol=1e-6) for name, grad in expected.items())
