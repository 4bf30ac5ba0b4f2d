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
from genft_kernels.functional import genft_linear
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
    """y and every gradient of the backend have an error that is allowed."""
    plain = errors_of_plain_pytorch(case, dtype, on.device)
    for name, error in errors_of(genft_linear, case, dtype, on.device, backend=on.backend).items():
        allowed = allowed_error(plain[name], dtype, case.longest_sum)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"
