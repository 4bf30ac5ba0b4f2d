"""A round: what the first layer of a forward has compared for all, and the glance that the others have at their own."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from genft_kernels import GenFTLinear
from genft_kernels.sharing import share, snapshot
from tests.helpers.adapted_models import adapted, generations, train
from tests.helpers.tiny_models import Encoder, tokens

LAYERS = 3


@pytest.fixture
def model(monkeypatch):
    """A model whose layers have been asked in several rounds, as in decoding; a glance sees two of their numbers."""
    monkeypatch.setattr(snapshot, "_FIRST_BYTES", 16)
    model = adapted(partial(Encoder, layers=LAYERS)).eval()
    with torch.no_grad():
        for _ in range(3):
            model(tokens())
        yield model


def layers(model):
    return [module for module in model.modules() if isinstance(module, GenFTLinear)]


def sees(model):
    """Whether the model answers with what its tensors are now."""
    return torch.equal(model(tokens()), copy.deepcopy(model)(tokens()))


def last(model):
    return layers(model)[-1]


SILENT = {  # changes that no version tells of, in no tensor's first numbers
    "own": lambda model: last(model).specific_up.data[5, 0].add_(1),
    "generator": lambda model: model.genft_generators["8x8"].column_down.data[1, 5].add_(1),
    "weight": lambda model: last(model).weight.data[5, 5].add_(1),
}


@pytest.mark.parametrize("change", SILENT.values(), ids=SILENT)
def test_any_element_counts_in_every_forward_of_the_model(model, change):
    for _ in range(3):
        change(model)
        assert sees(model)
        assert sees(model)
    assert generations(model) == 4


def bring_back(first, middle):
    """Have a layer merged and unmerged, so that it holds no factors."""
    middle.merge()
    middle.unmerge()


def ask_otherwise(first, middle):
    """Ask two layers in turn, the second one without gradients."""
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.enable_grad():
        first(x)
    middle(x)


MIDDLE = {  # that has a layer generate in the middle of a forward
    "version": lambda first, middle: middle.specific_up[5, 0].add_(1),
    "object": lambda first, middle: setattr(middle, "specific_up", nn.Parameter(middle.specific_up * 2)),
    "silent": lambda first, middle: middle.specific_up.data[5, 0].add_(1),
    "merged": bring_back,
    "settings": ask_otherwise,
}


@pytest.mark.parametrize("change", MIDDLE.values(), ids=MIDDLE)
def test_any_element_counts_after_a_generation_in_mid_forward(model, change):
    first, _, middle, *_ = layers(model)
    change(first, middle)
    for _ in range(2):
        model(tokens())
    for _ in range(2):
        SILENT["generator"](model)
        assert sees(model)


def test_a_forward_that_begins_with_a_generation_compares_nothing_then(model):
    with torch.enable_grad():
        for _ in range(2):
            model(tokens()).sum().backward()
    assert all(layer.share.batch.round == 1 for layer in layers(model))


@pytest.mark.parametrize("part", ["specific_up", "weight"])
def test_a_version_counts_in_every_forward_of_the_model(model, part):
    getattr(last(model), part)[5, 0] += 1  # neither a first number nor one of the weight's sample
    assert sees(model) and generations(model) == 2


def test_memory_that_is_read_otherwise_counts(model):
    weight, units = last(model).weight, model.genft_generators["8x8"].column_down
    weight.data = weight.data.t()
    model(tokens())
    assert generations(model) == 2
    units.data = units.data[:1]  # one of two
    with pytest.raises(RuntimeError):
        model(tokens())


def test_units_that_begin_to_train_get_a_gradient():
    model = adapted().eval()
    for layer in layers(model):  # a layer that differs in what trains would generate alone
        layer.specific_up.requires_grad_(False)
    for _ in range(3):
        model(tokens())
    last(model).specific_up.requires_grad_(True)
    model(tokens()).sum().backward()
    assert last(model).specific_up.grad.any()


def test_shared_units_that_begin_to_train_after_a_round_has_begun_get_a_gradient():
    model = adapted(partial(Encoder, layers=LAYERS)).eval()
    first, *_, second = layers(model)
    model.genft_generators.requires_grad_(False)
    x = torch.randn(3, 8, dtype=torch.float64)
    model(tokens())
    second(x)  # the round begins
    model.genft_generators.requires_grad_(True)
    loss = first(x).square().sum()
    shared = list(model.genft_generators.parameters())
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, shared))


def move(layer):
    """Have the layer's units elsewhere, where the memory that they had stays as it is."""
    vars(layer)["before"] = layer.specific_up.data
    layer.specific_up.data = layer.specific_up.data * 2


MIDWAY = {  # between two layers of one forward
    "first-numbers": lambda layer: layer.specific_up.data.mul_(2),
    "weight": lambda layer: layer.weight.data.mul_(2),
    "generator": lambda layer: layer.generator.row_up.data.mul_(2),
    "version": lambda layer: layer.specific_up[5, 0].add_(1),
    "object": lambda layer: setattr(layer, "specific_up", nn.Parameter(layer.specific_up * 2)),
    "place": move,
}


@pytest.mark.parametrize("change", MIDWAY.values(), ids=MIDWAY)
def test_a_change_between_two_layers_of_a_forward_is_seen_at_a_glance(model, change):
    first, *_, second = layers(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    first(x)  # the round begins
    change(second)
    assert torch.allclose(second(x), copy.deepcopy(second)(x), rtol=1e-12)  # which generates alone


def test_a_forward_compares_its_layers_in_one_go(model, monkeypatch):
    compared = []
    same = snapshot.Snapshot.same
    monkeypatch.setattr(snapshot.Snapshot, "same", lambda *args: compared.append(args) or same(*args))
    for _ in range(2):
        model(tokens())
    assert not compared


def test_other_layers_than_in_the_last_forward_compare_for_themselves(model, monkeypatch):
    x = torch.randn(3, 8, dtype=torch.float64)
    for layer in (*layers(model)[:2], layers(model)[0]):
        layer(x)
    SILENT["own"](model)
    assert torch.allclose(last(model)(x), copy.deepcopy(last(model))(x), rtol=1e-12)


@pytest.mark.parametrize("change", SILENT.values(), ids=SILENT)
@pytest.mark.parametrize("before", [1, -1], ids=["after the first layer", "where a forward left it out"])
def test_training_sees_any_element_before_a_layer_that_is_asked(before, change, monkeypatch):
    monkeypatch.setattr(snapshot, "_FIRST_BYTES", 16)
    model = adapted(partial(Encoder, layers=LAYERS)).train()
    for _ in range(2):
        train(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    for layer in layers(model)[:before]:
        layer(x)  # the first one generates for all
    change(model)
    assert torch.allclose(last(model)(x), copy.deepcopy(last(model))(x), rtol=1e-12)


def test_a_dropped_generation_does_not_wait_for_a_collection(model):
    import weakref

    batch = weakref.ref(last(model).share.batch)
    last(model).specific_up.mul_(2)
    model(tokens())
    assert batch() is None


def test_a_copy_holds_no_share(model):
    assert all(layer.share is not None for layer in layers(model))
    assert all(layer.share is None for layer in layers(copy.deepcopy(model)))


@pytest.mark.parametrize("part", ["specific_up", "weight"])
def test_a_device_is_not_alarmed_by_a_change_with_a_version(part, monkeypatch):
    for module in (share, snapshot):
        monkeypatch.setattr(module, "compares_at_once", lambda device: False)
    model = adapted(partial(Encoder, layers=LAYERS)).eval()
    with torch.no_grad():
        for _ in range(2):
            model(tokens())
            getattr(last(model), part).mul_(1.5)  # the last layer of a forward: the others have asked by then
            for _ in range(2):
                assert sees(model)
