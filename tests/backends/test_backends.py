"""Every operation backend against the specification, on the shared cases; and how a backend is chosen."""

import dataclasses
import functools

import pytest
import torch

from genft_kernels import GeneratorParameters, GenFTConfig, GenFTLinear, backends, philox, reference, update
from genft_kernels.backends import choices
from genft_kernels.backends.eager import update_tile
from genft_kernels.functional import factored_linear, genft_linear
from genft_kernels.sharing import node
from genft_kernels.update import generate_factors
from tests.helpers.accuracy import assert_as_accurate_as_pytorch, rounding_floor
from tests.helpers.cases import (
    CASES,
    CPU,
    SAMPLE,
    case_of,
    cases_and_dtypes,
    make_data,
    relative_error,
    run,
    runnable,
    slow_if_interpreted,
    with_seed,
)

RUNNERS = runnable()


@pytest.mark.parametrize("on", runnable(torch.float64))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_equals_the_reference(case, on):
    data, options = make_data(case), dict(training=True, seed=case.seed)
    expected = run(reference.genft_linear, data, case.config, **options)
    actual = run(genft_linear, data.to(on.device), case.config, backend=on.backend, **options)
    for name, exact in expected.items():
        assert actual[name].shape == exact.shape and actual[name].dtype == exact.dtype, name
        assert relative_error(actual[name], exact) <= 1e-12, name


@pytest.mark.parametrize("on", RUNNERS)
@pytest.mark.parametrize("case, dtype", cases_and_dtypes())
def test_error_is_at_most_twice_plain_pytorchs(case, dtype, on):
    assert_as_accurate_as_pytorch(case, dtype, on)


def generated(weights, layers, shared, case, backend):
    """Factors of a group of layers and the gradient of every parameter, each [L, ...], biases summed over layers."""
    stacked = GeneratorParameters(*(
        None if tensors[0] is None else tensors[0] if name.endswith("bias") else torch.stack(tensors)
        for name, tensors in zip(GeneratorParameters._fields, zip(*layers, strict=True), strict=True)
    ))  # fmt: skip
    settings = dict(dtype=torch.float32, dropout=case.config.dropout, seed=shared, backend=backend)
    factors = generate_factors(weights, stacked, case.config, **settings)
    inputs = {name: tensor for name, tensor in stacked._asdict().items() if tensor is not None}
    generator = torch.Generator().manual_seed(1)
    grads = (torch.randn(factor[0].shape, generator=generator).to(factor) for factor in (factors.h, factors.b))
    loss = sum((factor * grad).sum() for factor, grad in zip((factors.h, factors.b), grads, strict=True))
    return factors, dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


@pytest.mark.parametrize("on", RUNNERS)
@pytest.mark.parametrize("strides", ["equal", "different"])
@pytest.mark.parametrize(
    "name", ["factored-wide-bias", pytest.param("tiled-tall-bias", marks=slow_if_interpreted), "row-tiled",
             "dropout-tiled-bias-out_in", "ratio-all-rms-tiled", "column-tiled-bias"]
)  # fmt: skip
def test_layers_in_one_call_equal_each_alone(name, strides, on):
    case = case_of(name)
    data = [make_data(with_seed(case, seed), torch.float32).to(on.device) for seed in range(3)]
    weights = [layer.weight for layer in data]
    if strides == "different":
        weights[1] = weights[1].t().contiguous().t()
    biases = data[0].params
    layers = [
        GeneratorParameters(*(shared if name.endswith("bias") else own for name, own, shared in zip(
            biases._fields, layer.params, biases, strict=True
        )))
        for layer in data
    ]  # fmt: skip
    seeds = torch.tensor([5, -3, 2**40], device=on.device)
    together, grads = generated(weights, layers, seeds, case, on.backend)
    alone = [generated(weights[i : i + 1], layers[i : i + 1], seeds[i : i + 1], case, on.backend) for i in range(3)]
    # Several stages of sums, which a product of three matrices may add up in another order than three products.
    allowed = 4 * rounding_floor(torch.float32, case.longest_sum)
    for index, (factors, _) in enumerate(alone):
        assert relative_error(together.h[index], factors.h[0]) <= allowed
        assert relative_error(together.b[index], factors.b[0]) <= allowed
    for key, grad in grads.items():
        parts = [own[key] for _, own in alone]
        expected = sum(parts) if key.endswith("bias") else torch.cat(parts)
        assert relative_error(grad, expected) <= allowed, key


def apart(tensor):
    """The same values, each apart from its neighbour in memory."""
    return tensor if tensor is None else torch.stack([tensor, torch.full_like(tensor, 9)], -1)[..., 0]


@pytest.mark.parametrize("on", RUNNERS)
def test_thin_matrices_may_lie_anywhere_in_memory(on):
    """The ops do not promise that they are contiguous."""
    operations, (n_in, n_out, k), generator = backends.load(on.backend), (20, 12, 5), torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(on.device)

    weights, x, dy = list(random(2, n_out, n_in)), random(7, n_in), random(7, n_out)
    seeds = torch.tensor([3, -(2**40)], device=on.device)
    down, bias, of_out = random(2, k, n_in), random(k), random(2, n_out, k)
    row, of_in = (random(2, n_out, 3), random(2, n_in, 3), random(2, k, n_out)), random(2, n_in, k)
    h, b, psi, every = random(n_in, k), random(n_out, k), ("leaky_relu", 0.3), [True] * 4

    def results(lie):
        stage, update = (lie(seeds), *psi, "tanh"), (lie(seeds[:1]), 0.5, *psi, philox.ROW_STREAM)
        thin, factors = [lie(each) for each in row], (lie(h), lie(b))
        yield from operations.column(weights, lie(down), lie(bias), "tanh")
        yield from operations.column_backward(lie(of_out), weights, lie(of_out), "identity", [True, True])
        yield from operations.row(*thin, lie(bias), *stage)
        yield from operations.row_backward(lie(of_in), *thin, lie(of_in), *stage[:-1], "identity", every)
        yield operations.linear(x, weights[0], None, *factors, *update)[0]
        yield from operations.linear_backward(dy, x, weights[0], *factors, None, *update, every)

    for found, expected in zip(results(apart), results(lambda tensor: tensor), strict=True):
        assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("on", RUNNERS)
@pytest.mark.parametrize(
    "name", [pytest.param("dropout-square", marks=slow_if_interpreted), "dropout-tiled-bias-out_in",
             "column-tiled-bias", "row-tiled"]
)  # fmt: skip
def test_dropout_follows_the_seed(name, on):
    case = case_of(name)
    data = make_data(case, torch.float32).to(on.device)

    def outputs(seed):
        return run(genft_linear, data, case.config, backend=on.backend, training=True, seed=seed)["y"]

    assert torch.equal(outputs(3), outputs(3))
    assert torch.equal(outputs(3), outputs(torch.tensor([3])))
    assert not torch.allclose(outputs(3), outputs(4))
    evaluated = run(genft_linear, data, case.config, backend=on.backend, seed=3)["y"]
    assert not torch.allclose(evaluated, outputs(3))


@pytest.mark.parametrize("on", RUNNERS)
def test_mask_is_the_specifications_bit_for_bit(on):
    n_in, n_out, seed = 37, 70, 2**50 + 7
    x, ones = torch.eye(n_in, device=on.device), torch.ones
    h, b, weight = ones(n_in, 1).to(x), ones(n_out, 1).to(x), torch.zeros(n_out, n_in).to(x)
    settings = dict(dropout=0.4, training=True, seed=seed, backend=on.backend)
    kept = factored_linear(x, weight, None, h, b, **settings).t() != 0  # [out, in]
    expected = philox.keep_mask(torch.tensor([seed]), philox.ROW_STREAM, n_in, n_out, 0.4, slice(0, n_out))
    assert torch.equal(kept.cpu(), expected.bool())


@pytest.mark.parametrize("on", RUNNERS)
def test_seed_is_drawn_from_torchs_generator_by_default(on):
    case = case_of("dropout-square")
    data = make_data(case, torch.float32).to(on.device)
    results = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        results.append(run(genft_linear, data, case.config, backend=on.backend, training=True)["y"])
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2])


@pytest.mark.parametrize("on", RUNNERS)
@pytest.mark.parametrize("name", ["factored-many-tokens", "tiled-many-tokens", "dropout-square"])
def test_same_inputs_give_the_same_bits(name, on):
    case = case_of(name)
    data = make_data(case, torch.bfloat16).to(on.device)
    first, second = (run(genft_linear, data, case.config, backend=on.backend, training=True, seed=7) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiled-tall-bias", "dropout-tall", "column-tiled-bias"])
def test_eager_tiles_have_no_seams(name, dtype, monkeypatch):
    case = dataclasses.replace(case_of(name), out_features=270)
    data = make_data(case).to(dtype)
    whole = run(genft_linear, data, case.config, backend="eager", training=True, seed=1)
    monkeypatch.setattr(update_tile, "_TILE_ELEMENTS", 1)  # tiles of 64 rows
    tiled = run(genft_linear, data, case.config, backend="eager", training=True, seed=1)
    for key, expected in whole.items():
        assert relative_error(tiled[key], expected) <= 16 * torch.finfo(dtype).eps, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outer, dropout", [("identity", 0.0), ("gelu", 0.0), ("identity", 0.1)])
def test_eager_never_waits_for_a_value_of_its_device(outer, dropout, dtype):
    """Meta tensors have no values, so reading one raises; on a GPU it would stop the host and break a capture."""
    eager = backends.load("eager")
    meta = functools.partial(torch.empty, device="meta", dtype=dtype)
    weights, down, left, right, up = [meta(20, 12)] * 2, meta(2, 3, 12), meta(2, 20, 5), meta(2, 12, 5), meta(2, 3, 20)
    seeds, x, dy, h, b = meta(2, dtype=torch.int64), meta(9, 12), meta(9, 20), meta(12, 4), meta(20, 4)
    stages = outer, dropout, "silu"
    assert eager.column(weights, down, None, "silu")[0].shape == (2, 20, 3)
    eager.column_backward(meta(2, 20, 3), weights, meta(2, 20, 3), "silu", [True, True])
    assert eager.row(left, right, up, None, seeds, *stages)[0].shape == (2, 12, 3)
    eager.row_backward(meta(2, 12, 3), left, right, up, meta(2, 12, 3), seeds, *stages, [True] * 4)
    update = seeds[:1], 0.5, outer, dropout, philox.ROW_STREAM
    y, xh = eager.linear(x, weights[0], None, h, b, *update)
    dx, _, dh, db = eager.linear_backward(dy, x, weights[0], h, b, xh, *update, [True] * 4)
    assert (y.shape, dx.shape, dh.shape, db.shape) == (dy.shape, x.shape, h.shape, b.shape)


def test_auto_takes_the_first_that_can_run():
    for tiled in (False, True):
        open_ = backends.checked_request("auto", CPU, torch.float32, tiled)
        assert backends.is_open(open_) and backends.resolved(open_, CPU, torch.float32, "row", ()) == "eager"
    assert backends.checked_request("reference", CPU, torch.float32) == "reference"


def test_explicit_backend_never_becomes_another(monkeypatch):
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run on cpu: .*(not installed|float64)"):
        backends.checked_request("triton", CPU, torch.float64)
    monkeypatch.setattr(backends, "unavailable", lambda name, device, dtype: "it is broken today")
    with pytest.raises(RuntimeError, match="backend 'eager' cannot run on cpu: it is broken today"):
        backends.checked_request("eager", CPU, torch.float32)
    with pytest.raises(ValueError, match="backend must be one of auto, eager, triton, cuda, reference; got 'cutlass'"):
        backends.checked_request("cutlass", CPU, torch.float32)


def test_explain_names_every_backend_and_the_choice():
    text = backends.explain("cpu")
    assert text.startswith('backend="auto" on cpu: eager')
    assert all(f"  {name}: " in text for name in (*backends.OPERATION_BACKENDS, "reference"))


def test_card_without_a_number_is_explained_as_the_first(monkeypatch):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "_set_aside", {("triton", card): "set aside in this process: row: it broke"})
    monkeypatch.setattr(choices, "_tables", {card: {"a shape": "eager"}})
    monkeypatch.setattr(choices, "_load", lambda device: {})
    monkeypatch.setattr(backends, "unavailable", lambda name, device, dtype: None)
    monkeypatch.setattr(backends, "rejection", lambda name, device: None)
    monkeypatch.setattr(backends, "default_for", backends.default_for.__wrapped__)
    text = backends.explain("cuda")
    assert text.startswith(
        'backend="auto" on cuda:0: eager for the factored form, cuda for the tiled form; but for 1 m'
    )
    assert "rejected for auto: set aside in this process: row: it broke" in text


@pytest.mark.parametrize("on", runnable(torch.float64))
@pytest.mark.parametrize("name", SAMPLE)
def test_zero_units_change_nothing(name, on, monkeypatch):
    """As 16 bits have them on a GPU, here in float64."""
    case, asked = case_of(name), []

    def unit_multiple(device, dtype):
        asked.append(dtype)
        return 16

    monkeypatch.setattr(update, "unit_multiple", unit_multiple)
    data, options = make_data(case), dict(training=True, seed=case.seed)
    expected = run(reference.genft_linear, data, case.config, **options)
    actual = run(genft_linear, data.to(on.device), case.config, backend=on.backend, **options)
    assert asked
    for name, exact in expected.items():
        assert actual[name].shape == exact.shape and relative_error(actual[name], exact) <= 1e-12, name


@pytest.mark.parametrize(
    "settings", [{}, dict(bias=True, dropout=0.2, outer_activation="silu"), dict(transform="row", bias=True)], ids=str
)
def test_zero_units_of_a_generation_change_nothing(settings, monkeypatch):
    def results(multiple):
        for module in (update, node):
            monkeypatch.setattr(module, "unit_multiple", lambda device, dtype: multiple)
        torch.manual_seed(0)
        config = GenFTConfig(shared_dim=5, specific_dim=2, zero_delta=False, **settings)
        layer, x = GenFTLinear(20, 20, config=config, dtype=torch.float64), torch.randn(7, 20, dtype=torch.float64)
        layer(x).square().sum().backward()
        return [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]

    for padded, plain in zip(results(16), results(1), strict=True):
        assert relative_error(padded, plain) <= 1e-12
