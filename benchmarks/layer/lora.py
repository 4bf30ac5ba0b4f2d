"""LoRA in every form that one meets, as workloads: y = x W^T + s (x A^T) B^T, A [rank, in], B [out, rank].

A and B are trained; their gradients are compared with those of that formula.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layer import third_party
from benchmarks.layer.problem import Problem
from benchmarks.measure.workload import Workload
from genft_kernels.functional import factored_linear

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def way(problem: Problem, rank: int, forward: Forward) -> Workload:
    """A LoRA by its function of x, W, A, B and s, all in one dtype."""
    a, b, scale = _matrices(problem, rank)
    return _workload(problem, a, b, scale, lambda: forward(problem.x, problem.weight, a, b, scale))


def fused(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, backend: str) -> Tensor:
    """This package's: `factored_linear` with psi = identity, h = A^T and b = B."""
    return factored_linear(x, weight, None, a.T, b, scale=scale, backend=backend)


def peft(problem: Problem, rank: int, dtype: torch.dtype | None = None) -> Workload:
    """PEFT's layer, its adapters in `dtype`, by default that of the case."""
    from peft import LoraConfig, inject_adapter_in_model

    scale = problem.scale(rank)
    linear = nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=rank * scale, lora_dropout=0.0, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(linear), "default").train()
    h, b = problem.factors(rank, dtype)
    layer = model[0]
    layer.lora_A["default"].weight = a = nn.Parameter(h.detach().T.contiguous())
    layer.lora_B["default"].weight = b = nn.Parameter(b.detach())
    return _workload(problem, a, b, scale, lambda: model(problem.x))


class _HandDerived(torch.autograd.Function):
    """Added into y as it lies, and x A^T made again in backward: nothing but x is kept."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, weight).addmm_(x @ a.t(), b.t(), alpha=scale)

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b = ctx.saved_tensors
        dyb = dy @ b  # [T, rank]
        dx = (dy @ weight).addmm_(dyb, a, alpha=ctx.scale)
        return dx, None, (dyb.t() @ x).mul_(ctx.scale), (dy.t() @ (x @ a.t())).mul_(ctx.scale), None


def hand_derived(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Gradients by hand in plain PyTorch, the way unsloth does it."""
    return _HandDerived.apply(x, weight, a, b, scale)


def unsloth(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """unsloth's `LoRA_W`. It wants x of three dimensions."""
    return third_party.unsloth().LoRA_W.apply(x[None], weight, None, a, b, scale).squeeze(0)


def unsloth_qkv(problem: Problem, rank: int) -> Workload:
    """unsloth's `LoRA_QKV`: three projections of one x in a call, three weights of the case's shape.

    With its `inplace` off: on, backward writes dx over x, which the next call reads.
    """
    function, scale = third_party.unsloth().LoRA_QKV.apply, problem.scale(rank)
    weights = [problem.weight.clone() for _ in range(3)]
    factors = [_matrices(problem, rank)[:2] for _ in weights]
    leaves = {"x": problem.x}
    for index, (a, b) in enumerate(factors):
        leaves |= {f"a{index}": a, f"b{index}": b}
    arguments = [each for weight, (a, b) in zip(weights, factors, strict=True) for each in (weight, None, a, b, scale)]

    def formula(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(_lora(problem, leaves["x"], leaves[f"a{i}"], leaves[f"b{i}"], scale) for i in range(3))

    return Workload(
        lambda: tuple(y.squeeze(0) for y in function(problem.x[None], *arguments, False)),
        leaves, (problem.dy,) * 3, formula, ("three loras", rank), tuple(weights), projections=3,
    )  # fmt: skip


def nemo(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, triton: bool) -> Tensor:
    """NeMo Automodel's `LoRATritonFunction`, with its Triton kernels or its PyTorch products, added into x W^T."""
    function = third_party.nemo().LoRATritonFunction.apply
    return function(x, a, b, scale, x.dtype, triton, F.linear(x, weight))


def _matrices(problem: Problem, rank: int) -> tuple[Tensor, Tensor, float]:
    """A and B in x's dtype, and the scale."""
    h, b = problem.factors(rank)
    return h.detach().T.contiguous().requires_grad_(), b, problem.scale(rank)


def _workload(problem: Problem, a: Tensor, b: Tensor, scale: float, function) -> Workload:
    def formula(leaves: dict[str, Tensor]) -> tuple[Tensor]:
        return (_lora(problem, leaves["x"], leaves["a"], leaves["b"], scale),)

    leaves = {"x": problem.x, "a": a, "b": b}
    return Workload(function, leaves, (problem.dy,), formula, ("lora", len(a)), (problem.weight,))


def _lora(problem: Problem, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, problem.weight.to(x.dtype)) + scale * F.linear(F.linear(x, a), b)
