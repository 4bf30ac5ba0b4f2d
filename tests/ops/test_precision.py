"""Delta gain (docs/method.md#precision): the loss sees a small update in 16 bits, stochastic rounding is unbiased."""

import dataclasses

import pytest
import torch

from genft_kernels import reference
from genft_kernels.backends.eager import factored as eager_factored
from genft_kernels.backends.eager import rounding as stochastic_rounding
from genft_kernels.backends.eager.rounding import round_stochastically
from genft_kernels.functional import factored_linear, genft_linear
from tests.helpers.accuracy import factored_gains, gain
from tests.helpers.cases import Case, Runner, make_data, runnable, slow_if_interpreted

PATHS = {
    "factored": dict(inner_activation="tanh"),
    "tiled": dict(outer_activation="leaky_relu"),
    "dropout": dict(dropout=0.1),
    "tiled-dropout-bias": dict(outer_activation="gelu", dropout=0.1, bias=True),
    "column": dict(transform="column"),
    "sum": dict(transform="sum"),
    "row-tiled": dict(transform="row", outer_activation="tanh"),
}


WIDER = [torch.float16, torch.float32]  # with more digits than bfloat16 they lose less, if anything


def gains(settings: dict, dtype: torch.dtype, biased: bool, on: Runner, seed: int) -> torch.Tensor:
    """Delta gain of y and of dx at |dW| = |W| / 1000, [2], in a layer with or without a bias."""
    case = Case("gain", 200, 150, settings, leading=(140,), seed=seed)
    data = make_data(case).to(dtype)
    exact = data.to(torch.float64)
    delta = reference.delta_weight(exact.weight, exact.params, case.config, training=True, seed=seed).detach()
    scaling = 1e-3 * (exact.weight.norm() / delta.norm()).item()
    config = dataclasses.replace(case, settings={**settings, "scaling": scaling}).config
    data, delta = data.to(on.device), delta * scaling
    bias = data.bias if biased else None
    y = genft_linear(data.x, data.weight, bias, data.params, config, training=True, seed=seed, backend=on.backend)
    y, dx = y.detach().cpu(), torch.autograd.grad(y, data.x, data.grad)[0].cpu()
    x = exact.x.detach()
    frozen = torch.nn.functional.linear(x, exact.weight, exact.bias if biased else None)
    return torch.tensor([gain(y, frozen, x @ delta.T), gain(dx, exact.grad @ exact.weight, exact.grad @ delta)])


@pytest.mark.parametrize("on", runnable())
# With a bias and without, a backend may take different paths.
@pytest.mark.parametrize(
    "biased", [pytest.param(False, id="unbiased", marks=slow_if_interpreted), pytest.param(True, id="biased")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in WIDER)], ids=str)
@pytest.mark.parametrize("settings", PATHS.values(), ids=PATHS)
def test_delta_gain_at_a_thousandth(settings, dtype, biased, on):
    seeds = 4 if dtype == torch.bfloat16 else 1  # one bfloat16 gain of this size has a standard deviation of 0.026
    values = sum(gains(settings, dtype, biased, on, seed) for seed in range(seeds)) / seeds
    assert ((values >= 0.95) & (values <= 1.05)).all(), values


@pytest.mark.parametrize("extended", [False, True], ids=["a CPU's way", "a GPU's way"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_delta_gain_of_long_sums(dtype, extended, monkeypatch):
    """A vendor may add in another way where a sum is long; eager's factored form is left to vendors."""
    monkeypatch.setattr(eager_factored, "_extends", lambda tensor: extended)
    y_gain, dx_gain = factored_gains("eager", torch.device("cpu"), dtype, tokens=64, features=4096, narrow=256)
    assert abs(y_gain - 1) <= 0.05 and abs(dx_gain - 1) <= 0.05


@pytest.mark.parametrize("vendor", [True, False], ids=["oneDNN", "plain"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_delta_gain_of_few_tokens(tokens, dtype, transposed, vendor):
    """Decoding has products of its own; thousands of outputs, since one token's gain has few numbers."""
    n_out, n_in, k, scale = 24_000 // tokens, 256, 5, 0.5
    x, weight = torch.randn(tokens, n_in).to(dtype), (torch.randn(n_out, n_in) / 16).to(dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    h, b, bias = (torch.randn(*shape).to(dtype) for shape in ((n_in, k), (n_out, k), (n_out,)))
    frozen, delta = x.double() @ weight.double().t(), x.double() @ h.double() @ b.double().t()
    b = (b * (1e-3 / scale * frozen.norm() / delta.norm())).to(dtype)
    delta = scale * (x.double() @ h.double() @ b.double().t())
    torch.backends.mkldnn.set_flags(vendor)
    try:
        y, biased = (factored_linear(x, weight, each, h, b, scale=scale, backend="eager") for each in (None, bias))
    finally:
        torch.backends.mkldnn.set_flags(True)
    assert abs(gain(y, frozen, delta) - 1) <= 0.07
    assert torch.allclose(biased, y + bias, rtol=0, atol=0)


def test_delta_gain_sees_a_swallowed_update():
    x, w, d = torch.randn(128, 256), torch.randn(192, 256) / 16, torch.randn(192, 256) / 16e3
    x, w = x.bfloat16(), w.bfloat16()
    nearest = x @ (w.float() + d).bfloat16().T
    assert gain(nearest, x.double() @ w.double().T, x.double() @ d.double().T) < 0.85


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(dtype):
    exact = torch.randn(64, 64) * 0.05
    exact = exact.sign() * exact.abs().clamp(min=2**-14)  # below, float16 has a fixed spacing
    total = torch.zeros(64, 64, dtype=torch.float64)
    down, up = _neighbours(exact, dtype)
    for seed in range(400):
        out = torch.empty(64, 64, dtype=dtype)
        round_stochastically(exact.clone(), torch.tensor([seed * 7919]), out)
        assert ((out.double() == down) | (out.double() == up)).all()
        total += out.double()
    spacing = up - down
    bias = (total / 400 - exact.double()) / spacing.clamp(min=1e-30)
    assert bias.abs().max() < 5 * 0.5 / 400**0.5 and abs(bias.mean()) < 0.005


def test_rounding_is_repeatable_and_keeps_special_values():
    exact = torch.tensor([0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 3.38e38])
    for dtype in (torch.bfloat16, torch.float16):
        for seed in (None, torch.tensor([5]), torch.tensor([2**62 + 1])):
            out, again = torch.empty(7, dtype=dtype), torch.empty(7, dtype=dtype)
            round_stochastically(exact.clone(), seed, out)
            round_stochastically(exact.clone(), seed, again)
            assert torch.equal(out[:5], again[:5])
            assert out[:5].tolist() == exact[:5].tolist() and out[5].isnan()
            assert not out[6].isnan() and out[6] > 3e4


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], ids=hex)
def test_rounding_keeps_each_nan(bits):
    """Of NVIDIA's instructions NaN has all mantissa bits; a dither added to them would be carried into the sign."""
    exact = torch.full((64,), bits, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(64, dtype=dtype)
        round_stochastically(exact.clone(), torch.tensor([5]), out)
        assert out.isnan().all()


def test_rounding_wraps_round_its_table(monkeypatch):
    size = stochastic_rounding._TABLE_SIZE
    exact = torch.full((3, size // 2), 1.003)
    out = torch.empty(3, size // 2, dtype=torch.bfloat16)
    round_stochastically(exact.clone(), torch.tensor([size - 5]), out)
    share_up = (out.float() > 1.003).double().mean().item()
    assert abs(share_up - 0.003 / 2**-7) < 0.002


@pytest.mark.parametrize("seed", [None, 5, -3, 2**63 - 1])
def test_dither_gathered_on_a_device_is_what_a_cpu_reads(seed, monkeypatch):
    monkeypatch.setattr(stochastic_rounding, "_TABLE_SIZE", 8)
    table, integers = torch.randint(100, (8,), dtype=torch.int32), torch.zeros(5, 6, dtype=torch.int32)
    for piece, dither in stochastic_rounding._against_table(integers, table, (seed or 0) % 8):
        piece += dither
    seed = None if seed is None else torch.tensor([seed])
    assert torch.equal(stochastic_rounding._gathered(table, seed, 30, 0).view(5, 6), integers)


def _neighbours(exact, dtype):
    """The values of `dtype` next below and next above."""
    nearest = exact.to(dtype)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    below = torch.where(nearest.double() > exact.double(), torch.nextafter(nearest, -infinity), nearest)
    above = torch.where(nearest.double() < exact.double(), torch.nextafter(nearest, infinity), nearest)
    return below.double(), above.double()
