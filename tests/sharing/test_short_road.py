"""The short road: how little it takes, and that nothing wrong gets onto it."""

import copy
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from genft_kernels import GenFTConfig, GenFTLinear, accumulate, refresh, short_road
from genft_kernels.sharing.accumulate import _Marks
from tests.helpers.adapted_models import adapted, assert_close, generations, train
from tests.helpers.tiny_models import Encoder, tokens


@pytest.fixture
def layer():
    """A layer in evaluation whose last forward has left it factors at hand."""
    torch.manual_seed(0)
    config = GenFTConfig.preset("fast", shared_dim=3, specific_dim=2)
    layer = GenFTLinear(16, 12, config=config).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        layer(torch.randn(1, 1, 16))
        yield layer


def calls(function) -> tuple[int, int]:
    """(calls of Python functions, of built-in ones) that a second run makes."""
    function()
    return calls_of_one(function)


def calls_of_one(function) -> tuple[int, int]:
    found = {"call": 0, "c_call": 0}

    def count(frame, event, argument):
        if event in found:
            found[event] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found["call"] - 1, found["c_call"] - 1  # those of `function` itself, and of ending the count


def taken(monkeypatch) -> list[bool]:
    """Whether each forward from now on took the short road."""
    found, asked_again = [], short_road.asked_again

    def noted(*args):
        y, key = asked_again(*args)
        found.append(y is not None)
        return y, key

    monkeypatch.setattr("genft_kernels.together.asked_again", noted)
    return found


def test_a_forward_makes_fewer_calls_than_loras(layer):
    x = torch.randn(1, 1, 16)
    python, built_in = calls(lambda: layer(x))
    assert python <= 26 and built_in <= 21  # PEFT's layer of LoRA: 40 and 16


def test_a_layer_among_others_makes_few_calls():
    model = adapted(partial(Encoder, layers=4)).eval()
    layers = [module for module in model.modules() if isinstance(module, GenFTLinear)]
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            model(tokens())
        python, built_in = calls(lambda: [layer(x) for layer in layers])
    assert python / len(layers) <= 26 and built_in / len(layers) <= 23


def test_it_computes_what_the_long_road_does(layer, monkeypatch):
    x, found = torch.randn(2, 5, 16), taken(monkeypatch)
    short = layer(x)
    refresh(layer)
    assert torch.equal(layer(x), short) and found == [True, False]


def test_every_length_takes_it(layer, monkeypatch):
    found = taken(monkeypatch)
    for shape in ((16,), (0, 16), (1, 16), (2, 7, 16)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 12)
    assert found == [True] * 4


def test_it_ends_when_anything_changes_and_begins_anew(layer, monkeypatch):
    x, found = torch.randn(3, 16), taken(monkeypatch)
    for change in (
        lambda: layer.weight.data[0, 0].add_(1),
        lambda: layer.generator.column_up.data.add_(1),
        lambda: layer.column_specific_down.mul_(2),
        lambda: setattr(layer, "weight", nn.Parameter(layer.weight.clone(), False)),
    ):
        change()
        first = layer(x)
        assert torch.equal(layer(x), first) and found[-2:] == [False, True]


def test_masks_of_a_training_forward_do_not_reach_evaluation(monkeypatch):
    model = adapted(dropout=0.25)
    model.train()(tokens())  # and no backward: the factors of the column stage have masks
    found = taken(monkeypatch)
    evaluated = model.eval()(tokens())  # with gradients, as in training
    assert not found[0]
    refresh(model)
    assert torch.equal(model(tokens()), evaluated)


WRONG = {
    "dtype": (lambda: torch.randn(3, 16, dtype=torch.float64), TypeError, "x has dtype"),
    "size": (lambda: torch.randn(3, 15), ValueError, "in = 16"),
    "scalar": (lambda: torch.randn(()), ValueError, "in = 16"),
    "layout": (lambda: torch.randn(3, 16).to_sparse(), TypeError, "layout"),
    "no tensor": (lambda: [1.0] * 16, TypeError, "x must be"),
}


@pytest.mark.parametrize("make, error, message", WRONG.values(), ids=WRONG)
def test_an_x_that_does_not_fit_is_refused_as_ever(layer, make, error, message):
    with pytest.raises(error, match=message):
        layer(make())


def test_a_bias_that_does_not_fit_is_refused_as_ever(layer):
    layer.bias.data = layer.bias.data.double()
    with pytest.raises(TypeError, match="bias has"):
        layer(torch.randn(3, 16))


def test_a_backend_that_does_not_exist_is_refused_as_ever(layer):
    layer.backend = "none"
    with pytest.raises(ValueError, match="backend must be one of"):
        layer(torch.randn(3, 16))


def test_another_backend_generates_for_itself(layer, monkeypatch):
    x, found = torch.randn(3, 16), taken(monkeypatch)
    layer.backend = "eager"
    for _ in range(2):
        layer(x)
    assert found == [False, True] and layer.generator.group.generations == 2


@pytest.mark.parametrize(("psi", "expected"), [("identity", "eager"), ("tanh", "auto, tiled")])
def test_nothing_is_chosen_in_the_factored_form_alone(psi, expected, monkeypatch):
    layer = GenFTLinear(8, 12, config=GenFTConfig(shared_dim=3, specific_dim=2, outer_activation=psi)).eval()
    x, taken, apply = torch.randn(5, 8), [], short_road.apply_factors
    y = layer(x)
    monkeypatch.setattr(short_road, "apply_factors", lambda *args: taken.append(args[5]) or apply(*args))
    torch.testing.assert_close(layer(x), y)
    assert taken == [expected]


def test_forward_mode_is_refused_as_ever(layer):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        layer(torch.randn(3, 16))


def test_another_mode_asks_anew(layer, monkeypatch):
    x, found = torch.randn(3, 16), taken(monkeypatch)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert [layer(x).dtype for _ in range(2)] == [torch.bfloat16] * 2
    with torch.inference_mode():
        assert layer(x).is_inference()
    with torch.enable_grad():
        assert layer(x).requires_grad
    layer.train()(x)
    assert found == [True, False, True, False, False, False]


def test_hooks_of_the_generator_run_in_each_forward(layer):
    x, ran = torch.randn(3, 16), []
    for register in (layer.generator.register_forward_pre_hook, nn.modules.module.register_module_forward_pre_hook):
        handle = register(lambda module, args: ran.append(module))
        layer(x)
        layer(x)
        handle.remove()
        assert ran.count(layer.generator) == 2
        ran.clear()


def test_a_strided_tensor_is_compared_too(layer):
    units = layer.column_specific_down
    layer.column_specific_down = nn.Parameter(torch.randn(16, 2).t())
    assert layer.column_specific_down.shape == units.shape
    x = torch.randn(3, 16)
    layer(x)
    first = layer(x)
    layer.column_specific_down.data[1, 3] += 1
    assert not torch.equal(layer(x), first)


def test_a_weight_that_is_transposed_in_its_place_is_seen():
    model = adapted(partial(Encoder, layers=1)).eval()
    layer = model.layers[0].attention.query
    with torch.no_grad():
        model(tokens())
        layer.weight.data = layer.weight.data.t()
        model(tokens())
    assert generations(model) == 2


# --- training -------------------------------------------------------------------------------------------------------


def test_training_takes_it_where_another_layer_has_generated(monkeypatch):
    model, found = adapted(partial(Encoder, layers=2)).train(), taken(monkeypatch)
    first = train(model)
    assert found == [False] * 4
    assert_close(train(model), first, tolerance=0)
    assert found[4:] == [False, True, True, True]


def test_training_takes_it_once_without_a_backward_in_between():
    model = adapted(partial(Encoder, layers=2)).train()
    for count in range(1, 4):
        model(tokens())
        assert generations(model) == count


SEEDED = {"dropout": dict(dropout=0.5), "tiled": dict(outer_activation="tanh")}


@pytest.mark.parametrize("settings", SEEDED.values(), ids=SEEDED)
def test_training_that_draws_a_seed_takes_the_long_road(settings, monkeypatch):
    model, found = adapted(settings=settings).train(), taken(monkeypatch)
    for _ in range(3):
        train(model)
    assert not any(found)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_accumulation_takes_it_from_the_second_micro_batch_on(training, monkeypatch):
    model, found = adapted().train(training), taken(monkeypatch)
    for _ in range(2):
        model(tokens())
    with accumulate(model):
        outputs = []
        for roads in ([False], [True], [True]):
            found.clear()
            outputs.append(model(tokens()))
            assert set(found) == set(roads)
        with torch.no_grad():  # asks for factors without a graph
            found.clear()
            outputs.append(model(tokens()))
            assert not any(found) and not outputs[-1].requires_grad
    assert outputs[0].requires_grad and all(torch.equal(outputs[0], each) for each in outputs)


def test_marks_are_looked_at_once_a_backward(monkeypatch):
    looks, cleared = [], _Marks.cleared
    monkeypatch.setattr(_Marks, "cleared", lambda self: looks.append(1) or cleared(self))
    model = adapted().train()
    with accumulate(model):
        for _ in range(3):
            model(tokens()).sum().backward()
        assert len(looks) == 3
    assert len(looks) == 4


def test_a_weight_that_is_to_train_within_an_accumulation_is_refused():
    model = adapted().train()
    with pytest.raises(RuntimeError, match="changed within accumulate"), accumulate(model):
        for _ in range(2):
            model(tokens()).sum().backward()
            model.layers[0].attention.value.weight.requires_grad_(True)


def test_a_weight_that_is_to_train_is_refused_as_ever():
    model = adapted(partial(Encoder, layers=2)).train()
    for _ in range(2):
        train(model)
    model.layers[1].attention.value.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="keeps it frozen"):
        model(tokens())


def test_a_layer_in_training_makes_few_calls():
    model = adapted(partial(Encoder, layers=2)).train()
    first, second, *_ = [module for module in model.modules() if isinstance(module, GenFTLinear)]
    x, made = torch.randn(1, 3, 8, dtype=torch.float64), []
    for _ in range(3):
        first(x)
        made = calls_of_one(lambda: second(x))
    assert made[0] <= 52 and made[1] <= 37  # of the operation, that looks for listeners once


def test_gradients_are_those_of_the_long_road():
    model = adapted(partial(Encoder, layers=2)).train()
    for _ in range(2):
        train(model)
    assert_close(train(model), train(copy.deepcopy(model)), tolerance=0)
