"""The cases that every backend must pass, and the data for them."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from genft_kernels import GeneratorParameters, GenFTConfig, backends
from genft_kernels.functional import genft_linear
from genft_kernels.parameters import expected_shapes

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: settings are a dict
class Case:
    """One layer: its settings and shape, and the leading shape of x."""

    name: str
    in_features: int
    out_features: int
    settings: dict
    leading: tuple[int, ...] = (5,)
    seed: int = 11

    @property
    def config(self) -> GenFTConfig:
        with warnings.catch_warnings():  # some settings start where nothing trains; the data here is random anyway
            warnings.simplefilter("ignore")
            return GenFTConfig(**{"shared_dim": 5, "specific_dim": 2, "zero_delta": False, **self.settings})

    @property
    def longest_sum(self) -> int:
        """Terms of the longest sum in forward and backward: over features or tokens."""
        return max(self.in_features, self.out_features, math.prod(self.leading))


@dataclasses.dataclass
class Data:
    """Random inputs of a case; `x` and `params` require grad."""

    x: torch.Tensor  # [..., in]
    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor  # [out]
    params: GeneratorParameters
    grad: torch.Tensor  # [..., out]

    @property
    def differentiable(self) -> dict[str, torch.Tensor]:
        named = {f"params.{name}": t for name, t in self.params._asdict().items() if t is not None}
        return {"x": self.x, **named}

    def to(self, target: torch.dtype | torch.device) -> Data:
        """The same values in another dtype or on another device."""

        def cast(tensor, trains=False):
            return None if tensor is None else tensor.detach().to(target).requires_grad_(trains)

        params = GeneratorParameters(*(cast(t, True) for t in self.params))
        return Data(cast(self.x, True), cast(self.weight), cast(self.bias), params, cast(self.grad))


FACTORED = dict(inner_activation="tanh")
TILED = dict(inner_activation="silu", outer_activation="gelu")
DROPOUT = dict(inner_activation="gelu", dropout=0.3)

CASES = [
    Case("factored-square", 63, 63, FACTORED),
    Case("tiled-square", 63, 63, TILED),
    Case("dropout-square", 63, 63, DROPOUT),
    Case("dropout-tiled-bias-out_in", 20, 20, {**TILED, **DROPOUT, "bias": True, "delta_layout": "out_in"}),
    Case("factored-wide-bias", 500, 63, {**FACTORED, "bias": True, "scaling": 0.3}),
    Case("tiled-tall-bias", 63, 500, {**TILED, "bias": True, "weight_ratio": 1.7}),
    Case("dropout-tall", 6, 500, {**TILED, **DROPOUT}, leading=(2, 3)),
    Case("untied", 16, 16, {**TILED, "tie_specific": False}),
    Case("column-factored", 33, 17, {"transform": "column", "inner_activation": "relu"}),
    Case("column-tiled-bias", 17, 33, {**TILED, "transform": "column", "bias": True, "dropout": 0.2}),
    Case("row-factored-bias", 33, 17, {"transform": "row", "bias": True, "inner_activation": "tanh"}),
    Case("row-tiled", 17, 33, {**TILED, "transform": "row", "dropout": 0.2}),
    Case("sum-factored-bias", 33, 17, {**FACTORED, "transform": "sum", "bias": True, "weight_ratio": "rms"}),
    Case("sum-tiled", 17, 33, {**TILED, "transform": "sum", "dropout": 0.2, "ratio_scope": "all", "weight_ratio": 1.7}),
    Case("shared-only", 40, 24, {**TILED, "specific_dim": 0}),
    Case("specific-only", 24, 40, {**TILED, "shared_dim": 0}),
    Case("ratio-all-factored", 30, 50, {**FACTORED, "ratio_scope": "all", "weight_ratio": 1.4, "bias": True}),
    Case("ratio-all-rms-tiled", 50, 30, {**TILED, "ratio_scope": "all", "weight_ratio": "rms"}),
    Case("ratio-rms-column", 50, 30, {"transform": "column", "weight_ratio": "rms"}),
    Case("k-above-min", 3, 9, {**TILED, "bias": True}),
    Case("in-one", 1, 63, TILED),
    Case("out-one", 63, 1, {**TILED, "dropout": 0.4}),
    Case("one-by-one", 1, 1, FACTORED),
    Case("tiled-many-tokens", 40, 70, {**TILED, "bias": True, "dropout": 0.2}, leading=(2, 75)),
    Case("factored-many-tokens", 70, 40, {**FACTORED, "bias": True}, leading=(150,)),
    Case("wide-k", 90, 70, {**TILED, "shared_dim": 50, "specific_dim": 7}),
    Case("zero-tokens", 12, 8, TILED, leading=(0,)),
    Case("zero-tokens-factored", 12, 8, FACTORED, leading=(2, 0)),
    Case("vector-x", 12, 8, {**TILED, "dropout": 0.1}, leading=()),
    Case("vector-x-factored", 12, 8, FACTORED, leading=()),
    *(Case(f"inner-{name}", 24, 12, {"inner_activation": name}) for name in ("identity", "leaky_relu", "gelu", "silu")),
    *(
        Case(f"outer-{name}", 12, 24, {"outer_activation": name, "inner_activation": name})
        for name in ("relu", "leaky_relu", "silu", "tanh")
    ),
]


# A case of each kind, for what need not run on all of them each time.
SAMPLE = (
    "factored-square", "dropout-tiled-bias-out_in", "factored-wide-bias", "column-tiled-bias", "row-factored-bias",
    "untied", "ratio-all-rms-tiled", "k-above-min", "tiled-many-tokens", "factored-many-tokens", "outer-leaky_relu",
)  # fmt: skip
# Triton's interpreter takes seconds where its compiled kernels take microseconds.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
slow_if_interpreted = [pytest.mark.slow] if INTERPRETED else []


def cases_and_dtypes() -> list:
    """(case, dtype) as test parameters: every case in every dtype that a kernel computes in."""
    params = []
    for case in CASES:
        if case.in_features * case.out_features == 1:
            continue  # the rounding of a single number is luck
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # float16 differs from bfloat16 in conversions alone.
            sampled = dtype == torch.float16 or (INTERPRETED and dtype == torch.float32)
            marks = [pytest.mark.slow] if sampled and case.name not in SAMPLE else []
            params.append(pytest.param(case, dtype, marks=marks, id=f"{case.name}-{dtype}"))
    return params


def case_of(name: str) -> Case:
    """The shared case of that name."""
    return next(case for case in CASES if case.name == name)


def with_seed(case: Case, seed: int) -> Case:
    """The case with other random data."""
    return dataclasses.replace(case, seed=seed)


@dataclasses.dataclass(frozen=True)
class Runner:
    """An operation backend on a device."""

    backend: str
    device: torch.device


def runnable(dtype: torch.dtype = torch.float32) -> list:
    """Every backend on the CPU and on a CUDA device as test parameters, with the reason where it cannot run here."""
    params = []
    for device in (CPU, torch.device("cuda")):
        absent = device.type == "cuda" and not torch.cuda.is_available()  # conftest.py skips what is marked
        for name in backends.OPERATION_BACKENDS:
            reason = None if absent else backends.unavailable(name, device, dtype)
            marks = [pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")]
            marks += [pytest.mark.gpu] if device.type == "cuda" else []
            params.append(pytest.param(Runner(name, device), marks=marks, id=f"{name}-{device}"))
    return params


def make_data(case: Case, dtype: torch.dtype = torch.float64) -> Data:
    """Data whose update is neither negligible beside W nor overwhelming, the same for each call."""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)

    shapes = expected_shapes(case.config, case.in_features, case.out_features, case.config.hidden_dim)
    params = {
        name: None if shape is None else random(*shape, scale=0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }
    data = Data(
        x=random(*case.leading, case.in_features),
        weight=random(case.out_features, case.in_features, scale=case.in_features**-0.5),
        bias=random(case.out_features),
        params=GeneratorParameters(**params),
        grad=random(*case.leading, case.out_features),
    )
    for tensor in data.differentiable.values():
        tensor.requires_grad_(True)
    return data


def run(function, data: Data, config: GenFTConfig, **options) -> dict[str, torch.Tensor]:
    """y and the gradient of everything differentiable, by name."""
    y = function(data.x, data.weight, data.bias, data.params, config, **options)
    inputs = data.differentiable
    grads = torch.autograd.grad(y, list(inputs.values()), data.grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


class _FirstCalls(TorchDispatchMode):
    """The arguments that each of the package's ops is first called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[torch._ops.OpOverload, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "genft":
            self.arguments.setdefault(func, tree_map_only(torch.Tensor, torch.Tensor.detach, args))
        return func(*args, **(kwargs or {}))


def check_every_op(case: Case, backend: str) -> None:
    """`torch.library.opcheck` on the six ops, each with the arguments of its first call in the case."""
    with _FirstCalls() as calls:
        run(genft_linear, make_data(case, torch.float32), case.config, backend=backend, training=True, seed=1)
    for op, arguments in calls.arguments.items():
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    assert len(calls.arguments) == 6


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`, in float64; 0 for two empty or two zero tensors."""
    exact = exact.to(actual.device)
    difference = (actual.double() - exact.double()).norm().item()
    return difference and difference / max(exact.double().norm().item(), 1e-300)
