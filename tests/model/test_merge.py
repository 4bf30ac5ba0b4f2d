"""Merging updates into the weights, and disabling them: the same outputs, and the same bits afterwards."""

import pytest
import torch

from genft_kernels import GenFTConfig, GenFTLinear, apply_genft, disabled, merge, unmerge
from tests.helpers.accuracy import gain
from tests.helpers.model_cases import SAVED, SHARED, adapted, config, every_model
from tests.helpers.tiny_models import TiedModel, randomise, snapshot, tokens

# --- merging --------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_merge_gives_the_same_outputs_and_unmerge_the_same_bits(make, settings, dtype):
    model = adapted(make, settings).to(dtype)
    before, expected = snapshot(model), model(tokens())
    layers = [m for m in model.modules() if isinstance(m, GenFTLinear)]
    exact = [(m.weight.double() + m.delta_weight().double()).to(dtype) for m in layers]
    assert merge(model) is model
    for layer, weight in zip(layers, exact, strict=True):
        assert layer.merged and layer.weight.dtype == dtype and not layer.weight.requires_grad
        assert (layer.weight != weight).double().mean() < 0.02  # float32 and float64 may round a tie apart
    tolerance = 1e-12 if dtype == torch.float64 else 0.15
    assert torch.allclose(model(tokens()), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(RuntimeError, match="'.+' is merged already"):
        merge(model)
    with pytest.raises(RuntimeError, match="merged already"):
        layers[0].merge()
    assert unmerge(model) is model
    assert snapshot(model) == before and torch.equal(model(tokens()), expected)
    with pytest.raises(RuntimeError, match="'.+' is not merged"):
        unmerge(model)


@pytest.mark.parametrize("dtype, part", [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)], ids=["bfloat16", "float16"])
def test_merge_in_16_bits_leaves_less_than_half_of_a_small_update_and_in_float32_all(dtype, part):
    torch.manual_seed(0)
    layer = GenFTLinear(256, 256, config=GenFTConfig.preset("fast", zero_delta=False), dtype=dtype)
    with torch.no_grad():
        size = part * layer.weight.float().norm() / layer.delta_weight().norm()
        layer.column_specific_up.mul_(size)
        layer.generator.column_up.mul_(size)
    weight, delta = layer.weight.double(), layer.delta_weight().double()
    layer.merge()
    assert 0 < gain(layer.weight.double(), weight, delta) < 0.5
    layer.unmerge()
    layer.float().merge()
    assert gain(layer.weight.double(), weight, delta) == pytest.approx(1, abs=1e-3)


def test_merge_starts_from_the_frozen_weight_each_time():
    model = merge(adapted())
    first = model.layers[0].attention.query.weight.clone()
    randomise(model, 1.0)
    merge(unmerge(model))
    layer = model.layers[0].attention.query
    assert not torch.equal(layer.weight, first)
    assert torch.equal(layer.weight, layer.frozen_weight + layer.delta_weight())


def test_merge_leaves_tied_weights_elsewhere_alone():
    model = adapted(TiedModel, SHARED)
    embedding, bits = model.embedding.weight, model.embedding.weight.detach().clone()
    merge(model)
    assert model.embedding.weight is embedding and torch.equal(embedding, bits)
    assert not torch.equal(model.head.weight, bits)
    unmerge(model)
    assert model.head.weight is embedding


def test_merge_that_fails_merges_nothing(monkeypatch):
    model = adapted()
    before, last = snapshot(model), model.layers[1].attention.value
    monkeypatch.setattr(last, "delta_weight", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(model)
    monkeypatch.undo()
    assert snapshot(model) == before


def test_training_while_merged_raises():
    model = merge(adapted()).train()
    with pytest.raises(RuntimeError, match="a merged layer does not train"):
        model(tokens())


def test_casting_while_merged_keeps_both_weights():
    model = merge(adapted(TiedModel, SHARED))
    layers = (model.head, model.first)
    weights = [(layer.weight.double(), layer.frozen_weight.double()) for layer in layers]
    model.double()
    assert {layer.frozen_weight.dtype for layer in layers} == {torch.float64}
    for layer, (merged, frozen) in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight, merged) and torch.equal(layer.frozen_weight, frozen)
    unmerge(model)
    assert all(torch.equal(layer.weight, frozen) for layer, (_, frozen) in zip(layers, weights, strict=True))
    assert model.head.weight is model.embedding.weight


# --- disabling ------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_disabled_answers_with_the_frozen_model(make, settings, merged):
    model = make().eval()
    frozen = model(tokens())
    randomise(apply_genft(model, config(**settings)))
    if merged:
        merge(model)
    before, expected = snapshot(model), model(tokens())
    assert not torch.allclose(expected, frozen, atol=1e-3)
    with disabled(model) as same:
        assert same is model and torch.equal(model(tokens()), frozen)
        with disabled(model):
            assert torch.equal(model(tokens()), frozen)
        assert torch.equal(model(tokens()), frozen)
    assert torch.equal(model(tokens()), expected) and snapshot(model) == before
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(model(tokens()), expected) and snapshot(model) == before


def test_disabled_model_follows_casts_and_modes():
    model = adapted(settings=SAVED).double()
    with disabled(model):
        assert model(tokens()).dtype == torch.float64 and not model.classifier.training
    model.train()
    with disabled(model):
        assert model.classifier.training and not model(tokens()).requires_grad
