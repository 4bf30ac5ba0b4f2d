"""GenFTLinear: a drop-in for nn.Linear whose forward is the specification's, in every state and place."""

import copy
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genft_kernels import GenFTConfig, GenFTGenerator, GenFTLinear, reference
from genft_kernels.files.thin_update import exact
from tests.helpers.layers import config, every_config, make_layer, train_step
from tests.helpers.tiny_models import randomise

# --- a drop-in ------------------------------------------------------------------------------------------------------


def test_layer_is_a_drop_in_for_linear():
    ours, theirs = (inspect.signature(cls).parameters for cls in (GenFTLinear, nn.Linear))
    assert set(theirs) <= set(ours) and list(ours)[:3] == ["in_features", "out_features", "bias"]
    assert all(ours[name].default == theirs[name].default for name in theirs)
    layer, plain = GenFTLinear(40, 50, dtype=torch.float64), nn.Linear(40, 50, dtype=torch.float64)
    assert isinstance(layer, nn.Linear) and set(plain.state_dict()) <= set(layer.state_dict())
    assert (layer.in_features, layer.out_features, layer.weight.dtype) == (40, 50, torch.float64)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert GenFTLinear(40, 50, bias=False).bias is None
    layer.load_state_dict({**layer.state_dict(), **plain.state_dict()})
    x = torch.randn(3, 40, dtype=torch.float64)
    assert torch.allclose(layer(x), plain(x), rtol=0, atol=1e-14)  # zero_delta


@every_config
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_forward_is_the_specification(inputs, outputs, settings, bias):
    layer = make_layer(inputs, outputs, settings, bias=bias).eval()
    x = torch.randn(2, 5, inputs, dtype=torch.float64)
    delta = reference.delta_weight(layer.weight, layer.parameters_of_generator(), layer.config)
    assert delta.norm() > 1e-3 * layer.weight.norm()
    expected = F.linear(x, layer.weight + delta, layer.bias)
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())
    assert torch.equal(layer.delta_weight(), delta)


@every_config
def test_gradients_are_the_specifications(inputs, outputs, settings):
    layer, x = make_layer(inputs, outputs, settings), torch.randn(5, inputs, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    torch.manual_seed(1)
    ours = train_step(layer, x)
    torch.manual_seed(1)
    theirs = train_step(twin, x)
    assert set(ours) == set(theirs) and "weight" not in ours
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-10, atol=1e-12 * gradient.abs().max().item()), name


@every_config
def test_parameters_are_shared_units_then_specific_ones(inputs, outputs, settings):
    layer = make_layer(inputs, outputs, settings)
    params, generator = layer.parameters_of_generator(), layer.generator
    s, k = layer.config.shared_dim, layer.config.hidden_dim
    tied = layer.config.ties_specific(inputs, outputs)
    widths = {"column_down": inputs, "column_up": inputs, "row_down": outputs, "row_up": outputs}
    for name, width in widths.items():
        matrix = getattr(params, name)
        if layer.config.transform not in ("both", "sum", name.partition("_")[0]):
            assert matrix is None
            continue
        units = matrix if name.endswith("down") else matrix.t()
        assert units.shape == (k, width)
        if s:
            shared = getattr(generator, name)
            assert torch.equal(units[:s], shared if name.endswith("down") else shared.t())
        if k > s:
            end = name.rpartition("_")[2]
            specific = getattr(layer, f"specific_{end}" if tied else name.replace("_", "_specific_"))
            assert torch.equal(units[s:], specific if end == "down" else specific.t())
    for name, size in {
        "column_down_bias": k,
        "column_up_bias": inputs,
        "row_down_bias": k,
        "row_up_bias": outputs,
    }.items():
        exists = layer.config.bias and layer.config.transform in ("both", "sum", name.partition("_")[0])
        assert (getattr(params, name).shape == (size,)) if exists else (getattr(params, name) is None)
        assert getattr(params, name) is getattr(generator, name)


def test_layer_without_a_bias_has_one_that_is_none_as_a_linear_has():
    linear = nn.Linear(9, 9, bias=False)
    layer = GenFTLinear.from_linear(linear, make_layer(9, 9, dtype=torch.float32).generator)
    assert layer._parameters["bias"] is None is linear._parameters["bias"] and "bias" not in vars(layer)
    assert layer.state_dict().keys() >= linear.state_dict().keys()


def test_extra_repr_says_what_the_layer_is():
    layer = make_layer(12, 9)
    for part in ("in_features=12, out_features=9, bias=True", "shared_dim=3, specific_dim=2", "backend='auto'"):
        assert part in repr(layer)
    assert "merged" not in repr(layer)
    layer.merge()
    assert "merged" in repr(layer)
    fused = GenFTLinear.from_linear(nn.Linear(9, 27), GenFTGenerator(9, 9, config()), blocks=(3, (0, 2)))
    assert "blocks=[0, 2] of 3" in repr(fused)


def test_wrong_arguments_are_named():
    generator = GenFTGenerator(9, 9, config())
    with pytest.raises(ValueError, match="config and generator.config differ"):
        GenFTLinear(9, 9, config=config(scaling=2.0), generator=generator)
    with pytest.raises(ValueError, match="the generator is for in x out = 9x9, the layer is 9x12"):
        GenFTLinear(9, 12, generator=generator)
    with pytest.raises(ValueError, match="backend must be one of"):
        GenFTLinear(9, 9, generator=generator, backend="cudnn")
    with pytest.raises(ValueError, match="delta_layout='out_in' needs a square weight"):
        GenFTLinear(9, 12, config=config(delta_layout="out_in"))
    with pytest.warns(UserWarning, match="k = shared_dim . specific_dim = 5 exceeds min"):
        GenFTLinear(4, 9, config=config())
    with pytest.warns(UserWarning, match=r"k = .* = 5, doubled by the sum, exceeds min\(in, out\) = 8"):
        GenFTLinear(8, 9, config=config(transform="sum"))
    with pytest.raises(ValueError, match="x must be .* in = 9"):
        make_layer()(torch.zeros(2, 8, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensor_is_refused_by_name(layout):
    layer = make_layer()
    layer(torch.zeros(2, 9, dtype=torch.float64))  # what asks again takes a road of its own
    with pytest.raises(TypeError, match="x is a nested tensor"):
        layer(torch.nested.nested_tensor([torch.zeros(2, 9), torch.zeros(3, 9)], layout=layout, dtype=torch.float64))


# --- adapting an existing layer -------------------------------------------------------------------------------------


def test_from_linear_shares_storage_and_freezes():
    linear = nn.Linear(9, 7).eval()
    layer = GenFTLinear.from_linear(linear, GenFTGenerator(9, 7, config()))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    assert not layer.training and (layer.in_features, layer.out_features) == (9, 7)
    assert list(layer.state_dict())[:2] == ["weight", "bias"] and "generator.row_up" in layer.state_dict()


def test_from_linear_that_fails_freezes_nothing():
    linear = nn.Linear(9, 7)
    for options in (dict(backend="cudnn"), dict(blocks=(3, (0,)))):
        with pytest.raises(ValueError):
            GenFTLinear.from_linear(linear, GenFTGenerator(9, 9, config()), **options)
    assert linear.weight.requires_grad and linear.bias.requires_grad


def test_hooks_of_the_original_go_on_working():
    linear, seen = nn.Linear(9, 9), []
    linear.register_forward_pre_hook(lambda module, args: seen.append("before"))
    handle = linear.register_forward_hook(lambda module, args, y: y + 1)
    layer = GenFTLinear.from_linear(linear, GenFTGenerator(9, 9, config(zero_delta=True))).eval()
    x = torch.randn(2, 9)
    assert torch.allclose(layer(x), linear(x)) and seen == ["before", "before"]
    handle.remove()
    assert torch.allclose(layer(x), F.linear(x, linear.weight, linear.bias))


def test_fused_weight_changes_in_adapted_blocks_alone():
    linear = nn.Linear(9, 27, dtype=torch.float64)
    generator = GenFTGenerator(9, 9, config(inner_activation="tanh", delta_layout="out_in"), dtype=torch.float64)
    layer = randomise(GenFTLinear.from_linear(linear, generator, blocks=(3, (0, 2))))
    delta = layer.delta_weight()
    assert delta.shape == (27, 9) and not delta[9:18].any()
    for rows in (slice(0, 9), slice(18, 27)):
        expected = reference.delta_weight(linear.weight[rows], layer.parameters_of_generator(), layer.config)
        assert torch.equal(delta[rows], expected) and expected.any()
    x = torch.randn(4, 9, dtype=torch.float64)
    assert torch.allclose(layer(x), F.linear(x, linear.weight + delta, linear.bias), rtol=1e-12)
    gradients = train_step(layer, x)
    assert all(gradient.any() for gradient in gradients.values())


def test_layer_that_generates_alone_or_is_exported_calls_its_generator_once(monkeypatch):
    monkeypatch.setattr(GenFTLinear, "generates_alone", lambda self: True)
    layer, calls = make_layer(dtype=torch.float32), []
    layer.generator.register_forward_hook(lambda *_: calls.append("generator"))
    layer(torch.randn(3, 9))
    assert len(calls) == 1
    exact([layer])
    assert len(calls) == 2


def test_delta_weight_knows_no_dropout_and_is_differentiable():
    layer = make_layer(settings=dict(dropout=0.5))
    assert torch.equal(layer.train().delta_weight(), layer.eval().delta_weight())
    layer.delta_weight().square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters() if p.requires_grad)
    assert make_layer(dtype=torch.bfloat16).delta_weight().dtype == torch.float32


# --- training and presets -------------------------------------------------------------------------------------------


@every_config
def test_zero_delta_starts_at_the_frozen_layer_and_trains(inputs, outputs, settings):
    if not settings.get("shared_dim", 1):
        settings = settings | {"tie_specific": False}  # tied and without shared units it never could
    layer = GenFTLinear(inputs, outputs, config=config(**settings, zero_delta=True))
    x, target = torch.randn(32, inputs), torch.randn(32, outputs)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and not layer.delta_weight().any()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    assert all((p != start[name]).all() for name, p in trained.items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("init", ["linear", "trunc_normal"])
@pytest.mark.parametrize("transform, ups", [("column", (48,)), ("row", (24,)), ("sum", (48, 24))])
def test_zero_delta_by_the_downs_draws_the_ups_by_their_own_fan(transform, ups, init, bias):
    settings = dict(transform=transform, bias=bias, init_shared=init, init_specific_up="zeros", inner_activation="gelu")
    layer = GenFTLinear(48, 24, config=config(shared_dim=9, specific_dim=7, **settings, zero_delta="down"))
    x = torch.randn(32, 48)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and not layer.delta_weight().any()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if name.endswith("_up"):
            largest, n = parameter.abs().max(), parameter.shape[0]
            assert n in ups and 0.9 / n**0.5 < largest <= 1 / n**0.5 and not parameter.grad.any(), name
        elif parameter.requires_grad and not name.endswith("_up_bias"):
            assert not parameter.any() and parameter.grad.any(), name
    optimizer = torch.optim.SGD([parameter for parameter in layer.parameters() if parameter.requires_grad], lr=0.1)
    optimizer.step()
    layer(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("preset", ["glue", "llama", "fast-both"])
def test_presets_construct_and_train(preset):
    layer = GenFTLinear(32, 32, config=GenFTConfig.preset(preset))
    assert bool(layer.delta_weight().any()) == (preset != "fast-both")
    layer(torch.randn(4, 32)).square().sum().backward()
    assert layer.generator.row_up.grad.any()


@pytest.mark.parametrize("preset", ["fast", "fast-sum", "wegeft"])
def test_presets_of_single_stages_are_products_of_w_and_thin_matrices(preset):
    settings = GenFTConfig.preset(preset)
    layer = GenFTLinear(32, 24, config=settings)
    assert not layer.delta_weight().any()
    with torch.no_grad():
        for parameter in layer.generator.parameters():
            parameter.normal_()
    params, weight = layer.parameters_of_generator(), layer.weight
    rho = 1.0 if preset == "wegeft" else 1 / weight.square().mean().sqrt()
    expected = settings.scaling * rho * (weight @ params.column_down.T) @ params.column_up.T
    if preset == "fast-sum":
        expected = expected + settings.scaling * rho * params.row_up @ (params.row_down @ weight)
    assert torch.allclose(layer.delta_weight(), expected, rtol=1e-5, atol=1e-6)
    x = torch.randn(4, 32)
    assert torch.allclose(layer(x), F.linear(x, weight + expected, layer.bias), rtol=1e-4, atol=1e-5)


def test_vtab_preset_warns_that_its_specific_units_never_train():
    with pytest.warns(UserWarning, match="specific units can never train"):
        settings = GenFTConfig.preset("vtab")
    layer = GenFTLinear(48, 48, config=settings)
    layer(torch.randn(4, 48)).square().sum().backward()
    assert not layer.specific_down.grad.any() and not layer.specific_up.grad.any()
    assert layer.generator.column_down.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenFTConfig.preset("vtab", init_specific_down="kaiming_uniform")


@pytest.mark.parametrize("init", ["zeros", "kaiming_uniform", "xavier_uniform", "normal"])
def test_specific_units_start_as_asked(init):
    layer = GenFTLinear(64, 96, config=config(init_specific_down=init, init_specific_up="normal", specific_dim=20))
    bound = {"zeros": 0, "kaiming_uniform": 64**-0.5, "xavier_uniform": (6 / 84) ** 0.5, "normal": 0.06}[init]
    largest = layer.column_specific_down.abs().max()
    assert 0.5 * bound <= largest <= bound
    assert 0.008 < layer.row_specific_up.std() < 0.012
