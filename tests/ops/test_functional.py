"""The functional interface: gradients, drawn configurations, layouts of x, and what is kept for backward."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genft_kernels import GeneratorParameters, GenFTConfig, backends, reference
from genft_kernels.activations import ACTIVATIONS
from genft_kernels.functional import factored_linear, genft_linear
from tests.helpers.accuracy import SEEDS, allowed_error, medians, relative_errors
from tests.helpers.cases import CASES, Case, make_data, relative_error, run

BY_NAME = {case.name: case for case in CASES}
DIMENSIONS = st.sampled_from([1, 3, 63, 500])


@st.composite
def drawn_cases(draw):
    transform = draw(st.sampled_from(["both", "column", "row", "sum"]))
    in_features, out_features = draw(DIMENSIONS), draw(DIMENSIONS)
    square = in_features == out_features and transform == "both"
    shared = draw(st.integers(0, 6))
    config = dict(
        shared_dim=shared,
        specific_dim=draw(st.integers(0 if shared else 1, 3)),
        inner_activation=draw(st.sampled_from(ACTIVATIONS)),
        outer_activation=draw(st.sampled_from(ACTIVATIONS)),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.7])),
        bias=draw(st.booleans()),
        weight_ratio=draw(st.sampled_from([1.0, 0.5, 3.0, "rms"])),
        ratio_scope=draw(st.sampled_from(["weight", "all"])),
        scaling=draw(st.sampled_from([1.0, -0.3])),
        transform=transform,
        tie_specific=draw(st.booleans()),
        delta_layout=draw(st.sampled_from(["in_out", "out_in"] if square else ["in_out"])),
    )
    leading = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 3)]))
    return Case("drawn", in_features, out_features, config, leading, seed=draw(st.integers(0, 2**63 - 1)))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=drawn_cases(), training=st.booleans())
def test_drawn_configurations_equal_the_reference(case, training):
    data, options = make_data(case), dict(training=training, seed=case.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = run(reference.genft_linear, data, case.config, **options)
        actual = run(genft_linear, data, case.config, **options)
    for name, exact in expected.items():
        assert relative_error(actual[name], exact) <= 1e-12, name


@pytest.mark.parametrize(
    "name", ["dropout-tiled-bias-out_in", "untied", "column-tiled-bias", "row-factored-bias", "k-above-min"]
)
def test_gradcheck(name):
    case = BY_NAME[name]
    small = Case(name, 4, 4 if case.in_features == case.out_features else 6, {**case.settings, "shared_dim": 2}, (2, 2))
    data = make_data(small)
    names = [field for field, tensor in data.params._asdict().items() if tensor is not None]

    def function(x, *tensors):
        params = GeneratorParameters(
            **{**dict.fromkeys(GeneratorParameters._fields), **dict(zip(names, tensors, strict=True))}
        )
        return genft_linear(x, data.weight, data.bias, params, small.config, training=True, seed=3)

    assert torch.autograd.gradcheck(function, tuple(data.differentiable.values()), check_grad_dtypes=True)


@pytest.mark.parametrize("activation, dropout", [("identity", 0.0), ("gelu", 0.0), ("identity", 0.3), ("tanh", 0.3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_factored_linear_equals_the_reference(activation, dropout, dtype):
    options = dict(scale=0.7, activation=activation, dropout=dropout, training=True, seed=8)

    def results(function, tensors):
        x, h, b = (tensors[name].detach().requires_grad_() for name in ("x", "h", "b"))
        y = function(x, tensors["weight"], tensors["bias"], h, b, **options)
        return dict(zip(("y", "dx", "dh", "db"), (y, *torch.autograd.grad(y.square().sum(), (x, h, b))), strict=True))

    ours, plain = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        tensors = {
            "x": torch.randn(7, 33), "weight": torch.randn(65, 33) / 6, "bias": torch.randn(65),
            "h": torch.randn(33, 5), "b": torch.randn(65, 5) / 2,
        }  # fmt: skip
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        exact = results(reference.factored_linear, {name: tensor.double() for name, tensor in tensors.items()})
        ours.append(relative_errors(results(factored_linear, tensors), exact))
        plain.append(relative_errors(results(reference.factored_linear, tensors), exact))
    ours, plain = medians(ours), medians(plain)
    for name, error in ours.items():
        assert error <= (1e-12 if dtype == torch.float64 else allowed_error(plain[name], dtype, terms=65)), name


def test_factored_linear_is_lora():
    x, w, a, b = (
        torch.randn(7, 33).double(),
        torch.randn(65, 33).double(),
        torch.randn(4, 33).double(),
        torch.randn(65, 4).double(),
    )
    torch.testing.assert_close(factored_linear(x, w, None, a.T, b, scale=2.0), x @ w.T + 2.0 * (x @ a.T) @ b.T)


@pytest.mark.parametrize("name", ["factored-square", "tiled-square"])
def test_strided_and_broadcast_inputs(name):
    case = BY_NAME[name]
    data = make_data(case)
    base = torch.randn(63, 2, 3, dtype=torch.float64)
    wide = torch.randn(63, 2 * 63, dtype=torch.float64)
    layouts = {
        "transposed x": (base.permute(2, 1, 0), data.weight),
        "broadcast x": (base[:, 0, 0].expand(4, 5, 63), data.weight),
        "strided x": (torch.randn(4, 126, dtype=torch.float64)[:, ::2], data.weight),
        "transposed weight": (data.x, data.weight.t().contiguous().t()),
        "strided weight": (data.x, wide[:, ::2]),
    }
    for label, (x, weight) in layouts.items():
        x = x.detach().requires_grad_()
        results = []
        for function in (reference.genft_linear, genft_linear):
            y = function(x, weight, data.bias, data.params, case.config)
            # sum() hands a broadcast gradient back
            results.append([y, *torch.autograd.grad(y.sum(), [x, data.params.column_down, data.params.row_up])])
        for actual, exact in zip(*results, strict=True):
            assert relative_error(actual, exact) <= 1e-12, label


@pytest.mark.parametrize("name", ["factored-square", "tiled-square"])
def test_backward_computes_only_what_is_asked_for(name, monkeypatch):
    eager, case, asked = backends.load("eager"), BY_NAME[name], []
    backward = eager.linear_backward

    def noting_needs(*arguments):
        asked.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(eager, "linear_backward", noting_needs)
    data = make_data(case)
    for trains_x, trains_bias, trains_params in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        x, bias = data.x.detach().requires_grad_(bool(trains_x)), data.bias.clone().requires_grad_(bool(trains_bias))
        params = GeneratorParameters(
            *(None if t is None else t.detach().requires_grad_(bool(trains_params)) for t in data.params)
        )
        y = genft_linear(x, data.weight, bias, params, case.config)
        y.backward(data.grad)
        expected = reference.genft_linear(data.x, data.weight, data.bias, data.params, case.config)
        exact = torch.autograd.grad(expected, [data.x, data.params.row_up], data.grad)
        assert asked.pop() == [bool(trains_x), bool(trains_bias), bool(trains_params), bool(trains_params)]
        if trains_x:
            assert relative_error(x.grad, exact[0]) <= 1e-12
        if trains_bias:
            assert relative_error(bias.grad, data.grad.sum(0)) <= 1e-12
        if trains_params:
            assert relative_error(params.row_up.grad, exact[1]) <= 1e-12


def saved_elements(case: Case, dtype: torch.dtype, trains=("x", "params")) -> int:
    """Elements kept for backward in distinct storages, beside x, W, bias and the parameters' own."""
    data = make_data(case).to(dtype)
    data.x.requires_grad_("x" in trains)
    params = GeneratorParameters(
        *(None if t is None else t.detach().float().requires_grad_("params" in trains) for t in data.params)
    )
    own = {t.untyped_storage().data_ptr() for t in (data.x, data.weight, data.bias)}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = genft_linear(data.x, data.weight, data.bias, params, case.config, training=True)
    assert y.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "form", [dict(), dict(outer_activation="gelu"), dict(dropout=0.1)], ids=["factored", "tiled", "dropout"]
)
@pytest.mark.parametrize("shape", [(96, 96), (128, 64), (64, 160)], ids=str)
def test_memory_kept_for_backward_is_thin(shape, form, bias, dtype):
    (n_in, n_out), tokens, k = shape, 50, 7
    case = Case("memory", n_in, n_out, {"inner_activation": "silu", "bias": bias, **form}, leading=(tokens,))
    bound = (tokens + 4 * (n_in + n_out)) * (k + 1) + 4 * k
    assert bound < n_in * n_out * 2  # one in x out matrix more would be seen
    assert saved_elements(case, dtype) <= bound


def test_memory_that_no_gradient_asks_for_is_not_kept():
    case = Case("memory", 96, 64, {"inner_activation": "silu"}, leading=(50,))
    both = saved_elements(case, torch.float32)
    # Without a gradient for the parameters, dx needs the two factors alone.
    assert saved_elements(case, torch.float32, trains=("x",)) == 7 * (96 + 64) < both
    assert saved_elements(case, torch.float32, trains=("params",)) <= both


@pytest.mark.parametrize("name", ["factored-square", "tiled-square", "dropout-square"])
def test_inference_mode_leaves_nothing_behind_that_training_trips_over(name):
    case = BY_NAME[name]
    data = make_data(case, torch.bfloat16)
    with torch.inference_mode():  # memory that is used again must not become an inference tensor's
        genft_linear(data.x, data.weight, data.bias, data.params, case.config, training=True, seed=1)
    run(genft_linear, data, case.config, training=True, seed=1)


@pytest.mark.parametrize("name", ["dropout-square", "tiled-square"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_checkpointing_gives_the_same_gradients(name, dtype, reentrant):
    from torch.utils.checkpoint import checkpoint

    case = BY_NAME[name]
    data = make_data(case).to(dtype)

    def function(x):
        return genft_linear(x, data.weight, data.bias, data.params, case.config, training=True)

    results = []
    for wrapped in (function, lambda x: checkpoint(function, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        for tensor in data.differentiable.values():
            tensor.grad = None
        wrapped(data.x).backward(data.grad)
        results.append([tensor.grad.clone() for tensor in data.differentiable.values()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("name", ["factored-square", "tiled-square", "dropout-square"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_never_vanish(name, value, dtype):
    case = BY_NAME[name]
    for place in ("x", "weight", "params"):
        data = make_data(case).to(dtype)
        target = data.params.row_up if place == "params" else getattr(data, place)
        with torch.no_grad():
            target[1, 2] = value
        y = genft_linear(data.x, data.weight, data.bias, data.params, case.config, training=True, seed=1)
        affected = y[1] if place == "x" else y[:, 1]
        assert not affected.isfinite().any(), place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["factored-square", "tiled-tall-bias", "dropout-square"])
def test_autocast_equals_casting_by_hand(name, dtype):
    case = BY_NAME[name]
    data = make_data(case, torch.float32)
    by_hand = data.to(dtype)
    params = GeneratorParameters(*(None if t is None else t.detach().requires_grad_() for t in data.params))
    by_hand_y = genft_linear(by_hand.x, by_hand.weight, by_hand.bias, params, case.config, training=True, seed=2)
    by_hand_y.backward(by_hand.grad)
    with torch.autocast("cpu", dtype):
        y = genft_linear(data.x, data.weight, data.bias, data.params, case.config, training=True, seed=2)
    y.backward(by_hand.grad)
    assert y.dtype == dtype and torch.equal(y, by_hand_y)
    assert data.x.grad.dtype == torch.float32 and torch.equal(data.x.grad, by_hand.x.grad.float())
    for mine, theirs in zip(data.params, params, strict=True):
        assert mine is theirs is None or torch.equal(mine.grad, theirs.grad)


def test_float32_parameters_over_a_16_bit_weight_get_float32_gradients():
    case = BY_NAME["tiled-square"]
    data = make_data(case).to(torch.bfloat16)
    params = GeneratorParameters(*(None if t is None else t.detach().float().requires_grad_() for t in data.params))
    y = genft_linear(data.x, data.weight, data.bias, params, case.config)
    y.backward(data.grad)
    assert y.dtype == data.x.grad.dtype == torch.bfloat16
    assert all(t is None or t.grad.dtype == torch.float32 for t in params)


def test_second_derivatives_raise_instead_of_being_wrong():
    data, config = make_data(BY_NAME["factored-square"]), BY_NAME["factored-square"].config

    def f(x):
        return genft_linear(x, data.weight, data.bias, data.params, config).square().sum()

    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(f(data.x), data.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):  # it would take what is unused for a zero
        torch.autograd.functional.hvp(f, data.x.detach(), data.x.detach())


def forward_mode(f, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, x))).tangent


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "forward-mode": forward_mode,
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum() / 2)(x),
    "vmap": lambda f, x: torch.vmap(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_raise_instead_of_being_wrong(transform):
    case = Case("square", 16, 16, dict(inner_activation="tanh", outer_activation="gelu"))
    data, config = make_data(case), case.config
    weight = data.weight
    change = reference.delta_weight(weight, data.params, config)

    def f(x, backend="auto"):
        return genft_linear(x, weight, None, data.params, config, backend=backend)

    with pytest.raises(NotImplementedError, match='no torch.func transforms: use backend="reference"'):
        transform(f, data.x.detach())
    with pytest.raises(NotImplementedError, match="forward-mode"):
        transform(lambda x: factored_linear(x, weight, None, change.T, torch.eye(16)), data.x.detach())
    total = (weight + change).T
    expected = data.x @ total @ total.T if transform is TRANSFORMS["grad"] else data.x @ total
    assert torch.allclose(transform(lambda x: f(x, "reference"), data.x.detach()), expected)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("scope", ["weight", "all"])
def test_ratio_of_a_weight_of_zeros_is_finite(backend, scope):
    config = GenFTConfig(shared_dim=2, specific_dim=1, bias=True, weight_ratio="rms", ratio_scope=scope)
    sizes = [(3, 6), (6, 3), (3, 5), (5, 3), (3,), (6,), (3,), (5,)]
    params = GeneratorParameters(*(torch.randn(size) for size in sizes))
    y = genft_linear(torch.randn(4, 6), torch.zeros(5, 6), None, params, config, backend=backend)
    assert y.isfinite().all() and y.any()


@pytest.mark.parametrize("settings", [dict(), dict(outer_activation="gelu")], ids=["factored", "tiled"])
@pytest.mark.parametrize("leading", [(5,), (2, 3)], ids=str)
def test_output_may_be_changed_in_place(leading, settings):
    case = Case("square", 16, 16, dict(inner_activation="tanh", **settings), leading=leading)

    def in_place(*args, **options):
        return torch.relu_(genft_linear(*args, **options).add_(args[0]))

    def apart(*args, **options):
        return torch.relu(genft_linear(*args, **options) + args[0])

    data = make_data(case)
    changed, expected = run(in_place, data, case.config), run(apart, data, case.config)
    assert all(torch.equal(changed[name], expected[name]) for name in expected)
