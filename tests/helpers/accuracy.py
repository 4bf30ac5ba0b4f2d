"""How far off a result may be: twice as far as plain PyTorch is from float64, and never less than sums must be.

PyTorch's own error is what the machine's BLAS happens to get, so two things keep a bound from being luck: errors are
medians over random data, and `rounding_floor` follows from sizes alone.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping

import torch

from genft_kernels import reference
from genft_kernels.activations import activate
from genft_kernels.functional import factored_linear, genft_linear
from tests.helpers.cases import CPU, Case, Runner, make_data, relative_error, run, with_seed

SEEDS = range(5)


def rounding_floor(dtype: torch.dtype, terms: int) -> float:
    """The relative error that no bound goes below: a result rounded to `dtype`, and a float32 sum of `terms` numbers.

    A chain of n additions is off by about sqrt(n) roundings; how much less a BLAS gets by adding in blocks is its own.
    """
    return torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(terms)


def allowed_error(plain: float, dtype: torch.dtype, terms: int) -> float:
    """The relative error that is allowed where plain PyTorch's is `plain` and the longest sum has `terms` terms."""
    return 2 * plain + rounding_floor(dtype, terms)


def medians(errors: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each named error: at a kink of an activation one rounding may change one gradient by its size."""
    errors = list(errors)
    return {name: statistics.median(each[name] for each in errors) for name in errors[0]}


def relative_errors(actual: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """`relative_error` of every named tensor."""
    return {name: relative_error(actual[name], exact[name]) for name in exact}


@functools.cache
def exact_results(case: Case, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """The specification in float64, on the case's data of that seed rounded to `dtype`; made once for all backends."""
    case = with_seed(case, seed)
    data = make_data(case).to(dtype).to(torch.float64)
    return run(reference.genft_linear, data, case.config, training=True, seed=seed)


def errors_of(function, case: Case, dtype: torch.dtype, device: torch.device, **options) -> dict[str, float]:
    """Median relative error of y and each gradient of `function` against float64."""

    def errors(seed: int) -> dict[str, float]:
        data = make_data(with_seed(case, seed)).to(dtype).to(device)
        found = run(function, data, case.config, training=True, seed=seed, **options)
        for name, tensor in found.items():
            assert tensor.dtype == dtype and tensor.isfinite().all(), name
        return relative_errors(found, exact_results(case, dtype, seed))

    return medians(map(errors, SEEDS))


@functools.cache
def errors_of_plain_pytorch(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """On the device or on the CPU, whichever is worse: for a small product a vendor adds in one order or another."""
    of_devices = [errors_of(reference.genft_linear, case, dtype, each) for each in {device, CPU}]
    return {name: max(found[name] for found in of_devices) for name in of_devices[0]}


def assert_as_accurate_as_pytorch(case: Case, dtype: torch.dtype, on: Runner) -> None:
    """y and every gradient of the backend have an error that is allowed.

    In 16 bits a gradient is not judged across a kink: one rounding that moves an argument to its other side moves the
    gradient by many times its error, for plain PyTorch as for us, and some cases have such an argument in most seeds.
    float32 has none so near, and the slopes themselves are tested apart.
    """
    kinked = {"relu", "leaky_relu"} & {case.config.inner_activation, case.config.outer_activation}
    plain = errors_of_plain_pytorch(case, dtype, on.device)
    for name, error in errors_of(genft_linear, case, dtype, on.device, backend=on.backend).items():
        if kinked and dtype.itemsize == 2 and name != "y":
            continue
        allowed = allowed_error(plain[name], dtype, case.longest_sum)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


def gain(actual: torch.Tensor, without: torch.Tensor, update: torch.Tensor) -> float:
    """Delta gain <y - y0, d> / <d, d>; 1 means that the loss sees the update."""
    return ((actual.double() - without) * update).sum().item() / update.square().sum().item()


def factored_gains(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    narrow: int,
    activation: str = "identity",
) -> tuple[float, float]:
    """Delta gain of y and of dx at |dW| = |W| / 1000 of `factored_linear`, whose sums have `features` terms.

    `narrow` outputs of each product are enough to tell: W is [narrow, features] for y, its transpose for dx.
    """
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(device, dtype)

    def of(weight: torch.Tensor, rows: torch.Tensor, of_dx: bool) -> float:
        (n_out, n_in), k = weight.shape, 26
        h, b = random(n_in, k), random(n_out, k)
        wide, wide_rows = weight.double(), rows.double()
        delta = activate(activation, b.double() @ h.double().t())
        scale = 1e-3 * (wide.norm() / delta.norm()).item()
        x = (random(tokens, n_in) if of_dx else rows).requires_grad_()
        options = dict(activation=activation, training=True, seed=1, backend=backend)
        y = factored_linear(x, weight, None, h, b, scale=scale, **options)
        if of_dx:
            (found,) = torch.autograd.grad(y, x, rows)
            return gain(found, wide_rows @ wide, scale * (wide_rows @ delta))
        return gain(y.detach(), wide_rows @ wide.t(), scale * (wide_rows @ delta.t()))

    weight, rows = random(narrow, features), random(tokens, features)
    return of(weight, rows, False), of(weight.t().contiguous(), rows, True)
