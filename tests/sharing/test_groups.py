"""Grouped generation: one generation for all layers of a shape, and never a stale or a lost one."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, GenFTLinear, apply_genft, explain, merge, remove_genft, unmerge
from tests.helpers.adapted_models import (
    adapted,
    assert_close,
    generations,
    gradients,
    groups,
    loss_of,
    one_by_one,
    train,
)
from tests.helpers.tiny_models import (
    Encoder,
    FusedEncoder,
    FusedGroupedQueryBlock,
    GroupedQueryBlock,
    TiedModel,
    randomise,
    tokens,
)

MODELS = {
    "encoder": (Encoder, {}),
    "fused": (FusedEncoder, dict(fused_blocks={"qkv": (3, (0, 2))}, bias=True)),
    "fused-unequal": (FusedGroupedQueryBlock, dict(fused_blocks={"qkv_proj": ((8, 4, 4), (0, 2))}, bias=True)),
    "grouped-query": (
        GroupedQueryBlock,
        dict(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], outer_activation="gelu", weight_ratio="rms"),
    ),
    "tied-and-shared": (TiedModel, dict(target_modules=["first", "second", "head"])),
    "shared-only": (Encoder, dict(specific_dim=0)),
    "specific-only": (Encoder, dict(shared_dim=0, tie_specific=False)),
    "column": (Encoder, dict(transform="column", bias=True)),
    "row-dropout": (Encoder, dict(transform="row", dropout=0.3)),
    "sum": (Encoder, dict(transform="sum", bias=True)),
    "out_in": (Encoder, dict(delta_layout="out_in", bias=True)),
}
every_model = pytest.mark.parametrize("make, settings", MODELS.values(), ids=MODELS)
DROPOUT = dict(dropout=0.3)


# --- the same numbers, in one generation ----------------------------------------------------------------------------


@every_model
def test_a_group_computes_what_its_layers_do_alone(make, settings):
    model = adapted(make, settings).train()
    alone = one_by_one(model)
    assert_close(train(model), train(alone))
    assert generations(model) == len(groups(model)) + (make is TiedModel)  # in which a layer is called twice
    assert torch.allclose(model.eval()(tokens()), alone.eval()(tokens()), rtol=1e-12)


def test_each_layer_of_a_group_has_a_column_mask_of_its_own():
    model = adapted(settings=DROPOUT).train()
    layers = [m for m in model.modules() if isinstance(m, GenFTLinear)]
    for layer in layers[1:]:
        for mine, first in zip(layer.parameters(), layers[0].parameters(), strict=True):
            mine.data = first.detach().clone()
    seeds = [torch.tensor([7])]
    factors = [layer.generator.group.factors_for(layer, torch.float64, "eager", seeds)[0].h for layer in layers]
    assert generations(model) == 1
    assert all(not torch.equal(h, other) for i, h in enumerate(factors) for other in factors[:i])


def test_autocast_generates_in_its_own_dtype_and_returns_gradients_in_the_parameters():
    model = adapted(dtype=torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(tokens())
    y.float().sum().backward()
    assert generations(model) == 1
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = model(tokens())
    assert generations(model) == 2 and torch.allclose(y.float(), exact, rtol=0.1, atol=0.1)


# --- when factors hold, and when they end ---------------------------------------------------------------------------


def step(model, make):
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    make(trained, lr=0.1).step()


CHANGES = {
    "optimizer": lambda model: step(model, torch.optim.SGD),
    "fused-optimizer": lambda model: step(model, partial(torch.optim.AdamW, fused=True)),
    "shared": lambda model: randomise(model.genft_generators),
    "specific": lambda model: nn.init.ones_(model.layers[1].attention.value.specific_up),
    "weight": lambda model: model.layers[0].attention.query.weight.zero_(),
    "weight-replaced": lambda model: setattr(
        model.layers[0].attention.query, "weight", nn.Parameter(torch.ones(8, 8, dtype=torch.float64), False)
    ),
    "parameter-replaced": lambda model: model.layers[0].attention.query.register_parameter(
        "specific_up", nn.Parameter(torch.ones(8, 1, dtype=torch.float64))
    ),
    "state-dict": lambda model: model.load_state_dict(adapted().state_dict()),
    "state-dict-assigned": lambda model: model.load_state_dict(adapted().state_dict(), assign=True),
    "cast-there-and-back": lambda model: model.bfloat16().double(),
    "removed-and-adapted-anew": lambda model: randomise(
        apply_genft(remove_genft(model), GenFTConfig(shared_dim=2, specific_dim=1))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_without_gradients_they_hold_until_something_changes(change):
    model = adapted().eval()
    with torch.no_grad():
        first = model(tokens())
        assert torch.equal(model(tokens()), first) and generations(model) == 1
        change(model)
        second = model(tokens())
        assert not torch.allclose(second, first, rtol=1e-6)
        assert torch.equal(second, copy.deepcopy(model)(tokens()))  # a copy starts with nothing at hand
        before = generations(model)
        assert torch.equal(model(tokens()), second) and generations(model) == before


@torch.no_grad()
def test_what_data_hides_is_seen_after_the_next_eval():
    model = adapted().eval()
    model(tokens())
    for parameter in model.parameters():  # as collections of averaged parameters write them
        parameter.data.copy_(parameter.data * 2)
    second = model.eval()(tokens())
    assert torch.equal(second, copy.deepcopy(model)(tokens())) and generations(model) == 2


MODES = {
    "gradients": lambda model: model(tokens()),
    "inference": lambda model: torch.inference_mode()(model)(tokens()),
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16)(model.float().__call__)(tokens()),
    "frozen": lambda model: model.requires_grad_(False)(tokens()),
}


@pytest.mark.parametrize("call", MODES.values(), ids=MODES)
def test_another_mode_is_another_generation(call):
    model = adapted().eval()
    with torch.no_grad():
        model(tokens())
    call(model)
    assert generations(model) == 2


def test_the_training_mode_matters_where_there_is_column_dropout():
    # Some layers train and some do not: two generations, not one for each layer.
    model = adapted(settings=DROPOUT, make=lambda: Encoder(layers=4))
    for layer in model.layers:
        layer.attention.query.eval()
    loss_of(model)
    assert generations(model) == 2


def test_a_model_made_in_inference_mode_is_never_stale():
    with torch.inference_mode():
        model = adapted().eval()
        first = model(tokens())
        nn.init.zeros_(model.layers[0].attention.query.specific_up)
        assert not torch.equal(model(tokens()), first)
    assert "made in inference mode" in explain(model)


def test_merging_ends_them_too():
    model = adapted().eval()
    with torch.no_grad():
        expected = model(tokens())
        merge(model)(tokens())
        assert not any(group._shares[layer] for group in groups(model) for layer in group.layers)
        assert torch.equal(unmerge(model)(tokens()), expected) and generations(model) == 2


def test_a_backward_consumes_them_and_nothing_of_them_stays():
    model = adapted()
    (group,), layer = groups(model), model.layers[0].attention.query
    factors = []
    layer.register_forward_hook(lambda *_: factors.append(weakref.ref(group._shares[layer].factors[0].h)))
    losses = []
    for _ in range(3):
        losses.append(loss_of(model))  # as careless logging does
        losses[-1].backward()
    gc.collect()
    assert generations(model) == 3 and all(reference() is None for reference in factors)


# --- more than one forward or backward ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, DROPOUT], ids=["", "dropout"])
def test_two_forwards_before_their_backwards(settings):
    model = adapted(settings=settings).train()
    torch.manual_seed(1)
    outputs = [loss_of(model) for _ in range(2)]
    assert generations(model) == 2
    for output in outputs:
        output.backward()
    together = gradients(model)
    torch.manual_seed(1)
    sum(loss_of(model) for _ in range(2)).backward()
    assert_close(together, gradients(model))


def test_layers_of_one_generation_may_have_losses_apart():
    model = adapted()
    x = torch.randn(3, 8, dtype=torch.float64)
    layers = [m for m in model.modules() if isinstance(m, GenFTLinear)]
    losses = [layer(x).square().sum() for layer in layers]
    sum(losses).backward()
    expected = gradients(model)
    losses = [layer(x).square().sum() for layer in layers]
    for loss in losses:
        loss.backward()
    actual = gradients(model)
    assert_close(
        {k: v for k, v in actual.items() if v is not None}, {k: v for k, v in expected.items() if v is not None}
    )
    losses = [layer(x).square().sum() for layer in layers]
    losses[0].backward()
    with torch.no_grad():
        model.genft_generators["8x8"].column_down.add_(1)
    with pytest.raises(RuntimeError, match="column_down, was changed in place"):
        losses[1].backward()


def test_a_module_called_twice_in_one_forward():
    for settings in ({}, DROPOUT):
        model = adapted(TiedModel, dict(target_modules=["first", "second", "head"], **settings)).train()
        gradient = train(model)
        assert model.first.generator.group.generations == 2
        assert_close(gradient, train(one_by_one(model)))  # alone in its group, it draws the same masks


def test_second_derivatives_raise():
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss_of(model), trained, create_graph=True)


def test_layers_that_take_no_part_get_no_gradient():
    model = adapted()
    model.layers[0](model.embedding(tokens())).sum().backward()
    used, unused = (model.layers[i].attention.query for i in (0, 1))
    assert used.specific_up.grad.any() and unused.specific_up.grad is None
    alone = one_by_one(model)
    alone.layers[0](alone.embedding(tokens())).sum().backward()
    shared = [[p.grad for p in each.genft_generators.parameters()] for each in (model, alone)]
    assert all(torch.allclose(ours, theirs, rtol=1e-12) for ours, theirs in zip(*shared, strict=True))


@pytest.mark.parametrize("part", ["generator", "one layer", "all layers"])
def test_frozen_parts(part):
    model = adapted()
    expected = train(model)
    if part == "generator":
        model.genft_generators.requires_grad_(False)
    else:
        layers = [m for m in model.modules() if isinstance(m, GenFTLinear)]
        for layer in layers[:1] if part == "one layer" else layers:
            layer.requires_grad_(False)
    actual = train(model)
    assert 0 < len(actual) < len(expected)
    assert_close(actual, {name: expected[name] for name in actual})
    model.requires_grad_(False)
    assert not model(tokens()).requires_grad


def test_a_layer_that_has_left_is_not_generated_for():
    model = adapted()
    model(tokens())
    model.layers[1].attention.value = nn.Linear(8, 8, dtype=torch.float64).requires_grad_(False)
    gc.collect()
    (group,) = groups(model)
    assert len(group.layers) == 3
    assert_close(train(model), train(one_by_one(model)))


def test_a_forward_without_a_backward_leaves_nothing_behind():
    layer = GenFTLinear(64, 48, config=GenFTConfig(dropout=0.1, zero_delta=False))
    x = torch.randn(3, 64)

    def alive():
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    layer(x)
    layer(x)
    before = alive()
    for _ in range(5):
        layer(x)
    assert alive() == before
