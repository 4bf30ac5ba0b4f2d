"""Generators, units and weights that are pruned, parametrized, replaced or changed midway, and parts taken out."""

import copy
import warnings
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from genft_kernels import (
    GenFTConfig,
    GenFTGenerator,
    GenFTLinear,
    accumulate,
    apply_genft,
    explain,
    load_adapter,
    merge,
    optimizer_steps,
    save_adapter,
)
from tests.helpers.adapted_models import adapted, generations, gradients, loss_of, train
from tests.helpers.tiny_models import randomise, tokens


def adapted_pair(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    config = GenFTConfig(shared_dim=3, specific_dim=1, inner_activation="tanh", target_modules=["0", "2"], **settings)
    return randomise(apply_genft(model, config))


X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def materialised(model):
    """The answer that the model must give, by its layers' own account of their updates."""
    x = X
    for layer in (model[0], model[2]):
        for hook in layer._forward_pre_hooks.values():  # by which pruning computes
            hook(layer, ())
        x = F.linear(torch.tanh(x) if layer is model[2] else x, layer.frozen_weight + layer.delta_weight(), layer.bias)
    return x


WAYS = {
    "pruned-identity": prune.identity,
    "pruned": lambda module, name: prune.random_unstructured(module, name, 0.5),
    "parametrized": lambda module, name: parametrizations.weight_norm(module, name),
}
PARTS = {
    "generator": lambda model: (model.genft_generators["8x8"], "column_up"),
    "first-own": lambda model: (model[0], "specific_up"),
    "last-own": lambda model: (model[2], "specific_down"),
    "weight": lambda model: (model[2], "weight"),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)


@every_way
@every_part
def test_computed_tensors_count_as_they_are_now(way, part):
    model = adapted_pair().eval()
    with torch.no_grad():
        model(X)
    module, name = part(model)
    way(module, name)
    if name == "weight":
        module.requires_grad_(False)
        for each in model[2].specific_parameters().values():
            each.requires_grad_(True)
    for training in (True, False):
        model.train(training)
        for _ in range(3):
            trained = [p for p in model.parameters() if p.requires_grad]
            found = torch.autograd.grad(model(X).square().sum(), trained)
            y = materialised(model)
            wanted = torch.autograd.grad(y.square().sum(), trained)
            assert all(torch.allclose(f, w, rtol=1e-9, atol=1e-12) for f, w in zip(found, wanted, strict=True))
            with torch.no_grad():
                for parameter, gradient in zip(trained, wanted, strict=True):
                    parameter.sub_(gradient, alpha=0.01)
                assert torch.allclose(model(X), materialised(model), rtol=1e-12)
    with accumulate(model.train()):
        for _ in range(2):
            model(X).square().sum().backward()
    wanted = torch.autograd.grad(2 * materialised(model).square().sum(), trained)
    assert all(torch.allclose(p.grad, w, rtol=1e-9, atol=1e-12) for p, w in zip(trained, wanted, strict=True))
    if name != "weight":
        assert "computed (pruned, parametrized, a replica)" in explain(model)


@pytest.mark.parametrize("part", [PARTS["first-own"], PARTS["weight"]], ids=["own", "weight"])
def test_merging_what_pruning_computes_is_refused(part):
    model = adapted_pair().eval()
    prune.identity(*part(model))
    with pytest.raises(RuntimeError, match="make that permanent first"):
        merge(model)
    assert not model[0].merged and not model[2].merged


def test_merging_beside_a_pruned_generator_merges_what_is_left():
    model = adapted_pair().eval()
    prune.random_unstructured(model.genft_generators["8x8"], "row_up", 0.5)
    with torch.no_grad():
        expected = model(X)
        assert torch.allclose(merge(model)(X), expected)


def test_a_generator_that_is_assigned_to_a_layer_counts():
    model = adapted_pair().eval()
    with torch.no_grad():
        first = model(X)
    other = randomise(GenFTGenerator(8, 8, model[0].config, dtype=torch.float64), scale=1.0)
    for layer in (model[0], model[2]):
        layer.generator = other
    y = model(X)
    assert not torch.allclose(y, first) and torch.allclose(y, materialised(model), rtol=1e-12)
    y.sum().backward()
    assert other.row_up.grad.any()


# --- changes between forward and backward ---------------------------------------------------------------------------

MIDWAY = {
    "weight": lambda model: model.layers[0].attention.query.weight,
    "own": lambda model: model.layers[1].attention.value.specific_down,
    "generator": lambda model: model.genft_generators["8x8"].column_down,
}


@pytest.mark.parametrize("part", MIDWAY.values(), ids=MIDWAY)
def test_change_in_place_between_forward_and_backward_raises(part):
    model = adapted()
    x = torch.randn(4, 8, dtype=torch.float64)  # no gradient for x, so that the first product does not keep W
    loss = sum(layer.attention.query(x).sum() + layer.attention.value(x).sum() for layer in model.layers)
    with torch.no_grad():
        part(model).mul_(1.5)
    with pytest.raises(RuntimeError, match="changed in place between"):
        loss.backward()
    train(model)


def test_change_of_a_layer_that_has_no_part_in_the_loss_is_none_of_its_business():
    model = adapted()
    x = torch.randn(4, 8, dtype=torch.float64)
    loss = model.layers[0].attention.query(x).sum()
    with torch.no_grad():
        MIDWAY["own"](model).mul_(1.5)
        model.layers[1].attention.value.weight.mul_(1.5)
    loss.backward()
    assert model.layers[0].attention.query.specific_up.grad.any()


# --- parts taken out ------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """Another model around a part of an adapted one."""

    def __init__(self, part):
        super().__init__()
        self.part, self.head = part, nn.Linear(8, 2, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.part(x))


def steps(model, count, optimizers):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            model(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [str(each.message) for each in caught if "optimizer steps the layers' own units" in str(each.message)]


def sgd(parameters):
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("taken", [lambda part: part, copy.deepcopy], ids=["itself", "a-copy"])
def test_part_that_trains_without_its_generator_is_warned_of(taken):
    model = adapted()
    net = Around(taken(model.layers[0].attention.query))
    (message,) = steps(net, 4, [sgd(net.parameters())])
    assert "of shape 8x8" in message and "genft_generators" in message


def test_part_with_its_generators_beside_it_trains_and_is_saved_whole():
    model = adapted()
    net = Around(model.layers[0].attention.query)
    net.genft_generators = model.genft_generators
    before = model.genft_generators["8x8"].row_up.clone()
    assert not steps(net, 4, [sgd(net.parameters())])
    assert not torch.equal(model.genft_generators["8x8"].row_up, before)
    assert "genft_generators.8x8.row_up" in net.state_dict()


def test_replaced_generator_is_warned_of():
    model = adapted()
    net = Around(model.layers[0].attention.query)
    net.genft_generators = nn.ModuleDict({"8x8": GenFTGenerator(8, 8, net.part.config, dtype=torch.float64)})
    assert len(steps(net, 4, [sgd(net.parameters())])) == 1


def test_optimizers_that_step_in_turn_and_frozen_generators_are_not_warned_of():
    model = adapted_pair()
    own, shared = sgd([*model[0].parameters(), *model[2].parameters()]), sgd(model.genft_generators.parameters())
    assert not steps(model, 4, [own, shared])
    model.genft_generators.requires_grad_(False)
    model.zero_grad()
    assert not steps(model, 4, [own])
    layer = GenFTLinear(8, 8, config=GenFTConfig(shared_dim=2), dtype=torch.float64)
    assert not steps(layer, 4, [sgd(layer.parameters())])


def one_each(*parts):
    return [sgd([parameter]) for part in parts for parameter in part.parameters() if parameter.requires_grad]


def test_optimizers_of_one_parameter_each_are_told_from_generators_that_are_left_out(monkeypatch):
    model = adapted_pair(tie_specific=False)
    looked_up = Mock(wraps=optimizer_steps.all_groups)
    monkeypatch.setattr(optimizer_steps, "all_groups", looked_up)
    own, shared = one_each(model[0], model[2]), one_each(model.genft_generators)
    assert not steps(model, 4, [*own, *shared])
    assert looked_up.call_count == 1  # no look at all layers for each
    assert len(steps(model, 4, own)) == 1


def test_optimizers_that_step_in_backward_are_not_warned_of():
    model = adapted_pair()
    for optimizer in one_each(model):
        (parameter,) = optimizer.param_groups[0]["params"]
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    assert not steps(model, 4, [])


def load_warnings(net, state, **options):
    net.load_state_dict(state, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            net(torch.randn(3, 8, dtype=torch.float64))
    return [str(each.message) for each in caught if "was not: it is not a part" in str(each.message)]


def test_part_that_is_loaded_without_its_generator_is_warned_of():
    state = Around(adapted().layers[0].attention.query).state_dict()
    (message,) = load_warnings(Around(adapted().layers[0].attention.query), state)
    assert "of shape 8x8" in message and "genft_generators" in message


@pytest.mark.parametrize("generators_first", [False, True])
def test_generator_that_is_loaded_with_the_part_is_not_warned_of(generators_first):
    def whole():
        model = adapted()
        net = Around(model.layers[0].attention.query)
        net.genft_generators = model.genft_generators
        if generators_first:
            net._modules = dict(reversed(net._modules.items()))
        return net

    state = whole().state_dict()
    assert not load_warnings(whole(), state)
    shared = {name: tensor for name, tensor in state.items() if name.startswith("genft_generators")}
    net = whole()  # by two calls
    net.load_state_dict({name: tensor for name, tensor in state.items() if name not in shared}, strict=False)
    assert not load_warnings(net, shared, strict=False)
    plain = {name: tensor for name, tensor in state.items() if "specific" not in name and name not in shared}
    assert not load_warnings(whole(), plain, strict=False)


@pytest.mark.parametrize("changed", ["pruned", "parametrized"])
def test_generator_that_is_loaded_under_other_names_is_not_warned_of(changed):
    def whole():
        model = adapted_pair()
        generator = model.genft_generators["8x8"]
        for name in generator.tensor_names:
            if changed == "pruned":
                prune.l1_unstructured(generator, name, 0.5)
            else:
                parametrizations.weight_norm(generator, name)
        return model

    assert not load_warnings(whole(), whole().state_dict())


def test_generator_that_has_nothing_to_load_is_not_warned_of():
    part, other = (Around(adapted(shared_dim=0, zero_delta=False).layers[0].attention.query) for _ in range(2))
    assert not load_warnings(part, other.state_dict())


# --- frozen in part -------------------------------------------------------------------------------------------------


def test_layers_that_differ_in_what_trains_are_generated_apart():
    model = adapted()
    model.layers[0].attention.query.requires_grad_(False)
    loss_of(model).backward()
    assert generations(model) == 2
    assert all(gradient is not None for gradient in gradients(model).values())
    assert "8x8: 3 layers on cpu in one generation" in explain(model)
    assert model(tokens()).isfinite().all()


@every_way
@pytest.mark.parametrize("part", [PARTS["generator"], PARTS["last-own"]], ids=["generator", "own"])
def test_saving_and_loading_what_is_computed_is_refused(way, part, tmp_path):
    model = adapted_pair()
    save_adapter(model, tmp_path / "before")
    way(*part(model))
    for act in (save_adapter, load_adapter):
        with pytest.raises(RuntimeError, match="(8x8.column_up|2.specific_down)' is computed"):
            act(model, tmp_path / "before")


def test_parameter_over_the_memory_of_another_gets_the_gradient():
    model = adapted().eval()
    layer = model.layers[1].attention.value
    for _ in range(2):
        layer.specific_up = nn.Parameter(layer.specific_up.data)
        loss_of(model).backward()
        assert layer.specific_up.grad is not None and layer.specific_up.grad.any()
        layer.specific_up = nn.Parameter(layer.specific_up.data)
        model(tokens())
