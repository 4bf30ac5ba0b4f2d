"""Memory a generation keeps: between forward and backward no more than it must, of W its norm from step to step."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from genft_kernels import GenFTLinear, refresh, set_backend
from genft_kernels.backends.eager import operations
from genft_kernels.sharing import node, snapshot, weight_norm
from tests.helpers.adapted_models import adapted, assert_close, groups, loss_of, train
from tests.helpers.tiny_models import tokens

LAYERS, OUT, K = 4, 8, 3
TWO_STAGES = {
    "factored": (dict(inner_activation="gelu"), 1),
    "identity": (dict(inner_activation="identity", bias=True), 1),
    "tiled": (dict(outer_activation="silu"), 2),
    "dropout": (dict(dropout=0.3, inner_activation="relu"), 2),
}


@pytest.fixture
def counted(monkeypatch):
    """Calls of the operations of plain PyTorch, by name."""
    calls = []

    def counting(name, function):
        return lambda *args: calls.append(name) or function(*args)

    for name in ("column", "row"):
        monkeypatch.setattr(operations, name, counting(name, getattr(operations, name)))
    return calls


@pytest.mark.parametrize("settings, products", TWO_STAGES.values(), ids=TWO_STAGES)
def test_two_stages_keep_their_long_products_and_nothing_else(settings, products, monkeypatch):
    kept = []
    keep = node._kept
    monkeypatch.setattr(node, "_kept", lambda tensor: kept.append(tensor) or keep(tensor))
    loss = loss_of(adapted(settings=settings).train())
    assert [tensor.shape for tensor in kept] == [(LAYERS, OUT, K)] * products
    loss.backward()
    assert len(kept) == products


def test_sum_keeps_no_product_of_which_its_factors_are_copies(monkeypatch):
    kept = []
    keep = node._kept
    monkeypatch.setattr(node, "_kept", lambda tensor: kept.append(tensor.shape) or keep(tensor))
    loss_of(adapted(settings=dict(transform="sum", inner_activation="identity")).train())
    assert kept and (LAYERS, OUT, K) not in kept


@pytest.mark.parametrize("settings, products", TWO_STAGES.values(), ids=TWO_STAGES)
def test_no_backward_goes_over_a_weight_or_over_tiles_again(settings, products, counted):
    model = adapted(settings=settings).train()
    x = torch.randn(3, 8, dtype=torch.float64)
    losses = [m(x).square().sum() for m in model.modules() if isinstance(m, GenFTLinear)]
    assert counted == ["column", "row"]
    for loss in losses:
        loss.backward()
    assert counted.count("column") == 1 and counted.count("row") == (1 if products == 2 else 1 + LAYERS)


@pytest.mark.parametrize("transform", ["column", "row", "sum"])
def test_graph_of_one_stage_serves_one_backward_and_is_made_again_for_others(transform):
    def gradients(model):
        layers = [module for module in model.modules() if isinstance(module, GenFTLinear)]
        x = torch.ones(3, 8, dtype=torch.float64)
        for loss in [layer(x).square().sum() for layer in layers]:  # all hang on one generation
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    model = adapted(settings=dict(transform=transform)).train()
    actual = gradients(model)
    assert len(actual) > 5 and {group.generations for group in groups(model)} == {1}
    model.zero_grad()
    assert_close(actual, gradients(set_backend(model, "reference")), tolerance=1e-11)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("outer", ["identity", "tanh"])
def test_gradients_are_those_of_the_specification(outer, activation):
    model = adapted(settings=dict(inner_activation=activation, outer_activation=outer, bias=True)).train()
    actual = train(model)
    assert_close(actual, train(set_backend(model, "reference")), tolerance=1e-11)


# --- the norm of W --------------------------------------------------------------------------------------------------


def _rms(**settings):
    return adapted(settings=dict(weight_ratio="rms", **settings))


def _weight(model):
    return model.layers[0].attention.query.weight


@pytest.fixture
def taken(monkeypatch):
    """The layers whose norms were taken."""
    calls = []
    take = weight_norm.norms_of
    monkeypatch.setattr(weight_norm, "norms_of", lambda blocks: calls.append(blocks) or take(blocks))
    return calls


CHANGES = {
    "in-place": lambda model: _weight(model).mul_(2),
    "data": lambda model: _weight(model).data.mul_(2),
    "replaced": lambda model: setattr(
        model.layers[0].attention.query, "weight", nn.Parameter(torch.ones(8, 8, dtype=torch.float64), False)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_norm_of_a_weight_is_taken_once_until_it_changes(change, taken):
    model = _rms().train()
    for _ in range(3):
        train(model)
    assert len(taken) == LAYERS
    with torch.no_grad():
        change(model)
    actual = train(model)
    assert len(taken) == LAYERS + 1
    assert_close(actual, train(copy.deepcopy(model)))


def test_norm_of_a_weight_is_taken_anew_after_refresh(taken):
    model = _rms().train()
    train(model)
    _weight(model).data[1, 0] += 1  # which no version tells of, and not on the diagonal
    assert_close(train(refresh(model)), train(copy.deepcopy(model)))
    assert len(taken) == 3 * LAYERS


def test_norm_of_a_weight_is_taken_anew_where_a_change_would_be_waited_for(taken, monkeypatch):
    monkeypatch.setattr(snapshot, "compares_at_once", lambda device: False)
    model = _rms().train()
    train(model)
    _weight(model).data.mul_(2)
    assert_close(train(model), train(copy.deepcopy(model)))
    assert not taken


def test_norms_taken_in_inference_mode_serve_training():
    model = _rms().train()
    with torch.inference_mode():
        model(tokens())
    assert_close(train(model), train(copy.deepcopy(model)))


def test_norms_are_those_of_each_block():
    model = _rms().train()
    with torch.no_grad():
        for index, layer in enumerate(m for m in model.modules() if isinstance(m, GenFTLinear)):
            layer.weight.mul_(1 + index)
    train(model)
    assert_close(train(model), train(set_backend(model, "reference")), tolerance=1e-11)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_weight_that_was_cast_or_moved_is_not_kept_as_it_was(training):
    model = adapted(settings=dict(transform="column")).train(training)
    model(tokens())  # its result is dropped, so no backward consumes the factors
    before = [StorageWeakRef(m.weight.untyped_storage()) for m in model.modules() if isinstance(m, GenFTLinear)]
    model.float()
    assert before and all(weight.expired() for weight in before)
