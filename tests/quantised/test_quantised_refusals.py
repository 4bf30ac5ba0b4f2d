"""Which quantised layers are adapted and which are refused, and what is registered."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genft_kernels import (
    GenFTGenerator,
    GenFTLinear,
    apply_genft,
    frozen_weight,
    register_frozen_weight,
)
from tests.helpers.quantised_layers import (
    TOKENS,
    Int8Linear,
    Unreadable,
    config,
    quantised,
    registered,
    step,
)
from tests.helpers.tiny_models import Encoder


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


@pytest.mark.parametrize("kind", [nn.Linear, nn.Module, nn.Parameter, torch.Tensor, object])
def test_register_frozen_weight_refuses_what_means_every_layer(kind, monkeypatch):
    monkeypatch.setattr(frozen_weight, "_registered", {})
    name = f"{kind.__module__}.{kind.__qualname__}"
    for each in (kind, kind.__name__, name, f"nn.{kind.__name__}", f"torch.nn.{kind.__name__}"):
        with pytest.raises(ValueError, match="layers of all kinds"):
            register_frozen_weight(each, dense=lambda layer: layer.weight)
    register_frozen_weight(f"my_library.{kind.__name__}", dense=lambda layer: layer.weight)


@pytest.mark.parametrize("ratio", [1.0, "rms"])
def test_a_copy_where_its_kind_is_not_known_is_refused_with_the_cure(ratio, monkeypatch):
    """As in another process, which loads a whole model."""
    copied = copy.deepcopy(apply_genft(quantised(Encoder()), config(weight_ratio=ratio)))
    monkeypatch.setattr(frozen_weight, "_registered", {})
    monkeypatch.setattr(frozen_weight, "_found", {})
    with pytest.raises(RuntimeError, match="Int8Linear is not registered here: call register_frozen_weight first"):
        copied(TOKENS)
    registered()
    step(copied)


def test_register_frozen_weight_refuses_other_types():
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


def changed(monkeypatch, **settings) -> None:
    """Let the kind be another one from now on."""
    monkeypatch.setitem(
        frozen_weight._registered, Int8Linear, frozen_weight.Kind(lambda layer: layer.codes * layer.scale, **settings)
    )
    monkeypatch.setattr(frozen_weight, "_found", {})


def test_a_layer_that_is_no_longer_whole_is_refused_by_name_in_the_first_forward(monkeypatch):
    model = apply_genft(quantised(Encoder()), config())

    def packed(layer):
        raise ValueError("its scales are lost")

    changed(monkeypatch, packed=packed)
    with pytest.raises(ValueError, match="'layers.0.attention.query': Int8Linear: its scales are lost"):
        step(model)


def test_layers_that_let_no_gradient_through_are_refused_in_the_first_training_forward(monkeypatch):
    made = [apply_genft(quantised(Encoder(), names=["key"]), config()) for _ in range(2)]
    changed(monkeypatch, blocks_gradients=lambda layer: "it has no gradient")
    message = r"'layers.0.attention.key' \(Int8Linear\) comes after the target 'layers.0.attention.query': it has no"
    with torch.no_grad():
        made[0].train()(TOKENS)
    made[0].eval()(TOKENS)
    with pytest.raises(TypeError, match=message):
        step(made[1])


def test_modules_to_save_are_not_quantised():
    model = quantised(Encoder())
    with pytest.raises(TypeError, match=r"modules_to_save: 'layers.0.attention.query' is quantised \(Int8Linear\)"):
        apply_genft(model, config(modules_to_save=["layers.0.attention"], target_modules=["layers.1.attention.query"]))
    assert isinstance(model.layers[1].attention.query, Int8Linear)


def test_a_trained_module_that_is_quantised_later_is_refused_in_the_first_training_forward():
    model = apply_genft(Encoder(), config(modules_to_save=["classifier"], target_modules=["query"]))
    model.classifier = Int8Linear(nn.Linear(8, 3))
    with pytest.raises(TypeError, match=r"modules_to_save: 'classifier' is quantised \(Int8Linear\) and cannot train"):
        step(model)
