"""On a device, whose values are compared a forward late: steps of optimizers, bytes, and captured graphs."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genft_kernels import GenFTConfig, accumulate, apply_genft, register_frozen_weight
from genft_kernels.sharing import cache, share, snapshot
from tests.helpers.adapted_models import generations
from tests.helpers.tiny_models import randomise


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Values are compared as on a device."""
    for module in (share, snapshot):
        monkeypatch.setattr(module, "compares_at_once", lambda device: False)


def pair(**settings):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return randomise(
        apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["0", "1"], **settings))
    )


# --- steps of optimizers --------------------------------------------------------------------------------------------


class Unseen(torch.optim.Optimizer):
    """Writes as kernels of other libraries do: no version tells."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=0.1)


OPTIMIZERS = {"fused": lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True), "unseen": Unseen}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def optimizer_of(make, model):
    return make([p for p in model.parameters() if p.requires_grad])


def loss_of(model):
    return model(torch.ones(3, 8)).square().mean()


def accumulated(model):
    with accumulate(model):
        for _ in range(2):
            loss_of(model).backward()


def checkpointed(model):
    checkpoint(model, torch.ones(3, 8), use_reentrant=False).square().mean().backward()


ROADS = {
    "plain": (lambda model: loss_of(model).backward(), {}),
    "accumulate": (accumulated, {}),
    "checkpointed": (checkpointed, dict(dropout=0.1)),
}


@every_optimizer
@pytest.mark.parametrize(("train", "settings"), ROADS.values(), ids=ROADS)
def test_evaluation_follows_the_steps_of_any_optimizer(train, settings, optimizer):
    model = pair(**settings)
    stepped = optimizer_of(optimizer, model)
    for _ in range(3):
        with torch.no_grad():
            fresh = copy.deepcopy(model).eval()(torch.ones(3, 8))
            assert all(torch.equal(model.eval()(torch.ones(3, 8)), fresh) for _ in range(2))
        train(model.train())
        stepped.step()
        stepped.zero_grad()


def test_evaluation_follows_the_steps_on_units_of_layers_alone():
    model = pair()
    model.genft_generators.requires_grad_(False)
    stepped = optimizer_of(Unseen, model)
    accumulated(model)
    with torch.no_grad():
        model.eval()(torch.ones(3, 8))
        stepped.step()
        assert torch.equal(model(torch.ones(3, 8)), copy.deepcopy(model)(torch.ones(3, 8)))


@every_optimizer
def test_a_graph_of_before_a_step_is_refused(optimizer):
    model = pair()
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    optimizer_of(optimizer, model).step()
    with pytest.raises(RuntimeError, match="changed in place|modified by an inplace operation"):
        loss.backward()


@every_optimizer
def test_a_graph_of_what_was_not_stepped_is_not(optimizer):
    model, other = pair(), pair()
    loss = loss_of(model)
    loss_of(other).backward()
    optimizer([p for each in (model, other) for p in each.parameters() if p.requires_grad]).step()
    loss.backward()


def test_optimizers_of_other_models_are_left_alone():
    pair()
    other = nn.Linear(8, 8)
    loss_of(other).backward()
    before = other.weight._version
    optimizer_of(Unseen, other).step()
    assert other.weight._version == before


def test_steps_on_a_parameter_that_took_anothers_place_are_told():
    model = pair()
    model.genft_generators.requires_grad_(False)
    for _ in range(2):
        loss_of(model).backward()
        before = model[0].specific_up._version
        Unseen([model[0].specific_up]).step()
        assert model[0].specific_up._version > before
        model[0].specific_up = nn.Parameter(model[0].specific_up.detach().clone())


# --- bytes ----------------------------------------------------------------------------------------------------------


class Float8Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.bias = 8, 8, None
        self.weight = nn.Parameter(torch.randn(8, 8).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.float().t()


def dense(layer):
    return layer.weight.float()


def test_nan_that_stays_is_no_change():
    model = pair().eval()
    with torch.no_grad():
        model[0].specific_up[0, 0] = float("nan")
        model[1].weight.data.fill_diagonal_(float("nan"))
        for _ in range(3):
            model(torch.ones(3, 8))
        model[1].specific_up.data[0, 0] += 1
        model(torch.ones(3, 8))
        with pytest.raises(RuntimeError, match="updates that were out of date"):
            model(torch.ones(3, 8))


def test_codes_in_float8_are_compared():
    register_frozen_weight(Float8Linear, dense=dense)
    model = nn.Sequential(Float8Linear(), Float8Linear())
    apply_genft(model, GenFTConfig(shared_dim=2, specific_dim=1, target_modules=["0", "1"])).eval()
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(3, 8))
        model[0].base_layer.weight.data.view(torch.uint8)[0, 0] ^= 1
        model(torch.ones(3, 8))
        with pytest.raises(RuntimeError, match="updates that were out of date"):
            model(torch.ones(3, 8))


# --- captured graphs ------------------------------------------------------------------------------------------------


@pytest.fixture
def capture(monkeypatch):
    """All is captured, on the one stream that `torch.cuda.graph` has."""
    monkeypatch.setattr(cache, "current_stream", lambda device: (1, True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layers", [slice(1), slice(2)], ids=["single", "pair"])
def test_each_captured_graph_has_a_generation_of_its_own(capture, layers, training):
    model = pair().train(training)
    with torch.no_grad():
        for count in range(1, 4):
            model[layers](torch.ones(3, 8))
            assert generations(model) == count


def test_nothing_is_kept_for_comparison_in_a_captured_graph(capture, monkeypatch):
    monkeypatch.setattr(share, "Watch", None)
    with torch.no_grad():
        pair().eval()(torch.ones(3, 8))
