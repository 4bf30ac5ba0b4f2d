"""The gate before every timing: outputs and all gradients against float64, and whether a small update is seen.

A provider may be off by at most twice what plain PyTorch is off by at that dtype, for each tensor by itself.
"""

import dataclasses

import torch
from torch import Tensor

from benchmarks.layer.problem import Problem
from benchmarks.measure.workload import Workload, named

# ||dW|| / ||W|| where delta gain is measured (docs/method.md#precision).
SMALL_RATIO = 1e-3


class WrongResult(Exception):
    """A provider whose output or gradient is off; the message names the tensor."""


def refusal(error: Exception) -> dict[str, str]:
    """Status and reason of what was not timed because it is wrong or raised.

    That must not end the others' run, unless the device itself is lost.
    """
    if isinstance(error, torch.AcceleratorError):
        torch.cuda.synchronize()  # raises again where the device is lost; a capture that failed has not harmed it
    if isinstance(error, WrongResult):
        return {"status": "wrong", "reason": str(error)}
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}


@dataclasses.dataclass
class Expected:
    """What a formula gives in float64, and how far plain PyTorch is off at the case's dtype."""

    exact: dict[str, Tensor]
    plain_error: dict[str, float]

    @classmethod
    def of(cls, workload: Workload, dtype: torch.dtype) -> "Expected":
        workload = workload.checked or workload
        exact = _evaluate(workload, torch.float64)
        plain = _evaluate(workload, dtype)
        return cls(exact, {name: relative_error(plain[name], tensor) for name, tensor in exact.items()})

    def check(self, workload: Workload, dtype: torch.dtype) -> None:
        """Raise WrongResult where `workload` is off by more than twice plain PyTorch's error."""
        results = workload.results()
        if results.keys() != self.exact.keys():
            raise WrongResult(f"it gives {', '.join(results)} and not {', '.join(self.exact)}")
        for name, exact in self.exact.items():
            actual, allowed = results[name], 2 * self.plain_error[name] + torch.finfo(dtype).eps
            if actual.shape != exact.shape:
                raise WrongResult(f"{name} has shape {list(actual.shape)} and not {list(exact.shape)}")
            error = relative_error(actual, exact)
            if not error <= allowed:
                raise WrongResult(f"{name} is off by {error:.2g} of its norm; twice plain PyTorch is {allowed:.2g}")


def delta_gain(workload: Workload, expected: Expected, problem: Problem, small: Problem) -> tuple[float, float]:
    """Of y and dx: <y - y0, d> / <d, d>, d the update's exact contribution, y0 the exact output without it.

    `workload` is built on `small`, `expected` on `problem`; they differ in sigma alone, and d is linear in sigma.
    """
    results = workload.results()
    x, weight = problem.x.detach().double(), problem.weight.double()
    if "y" not in results:  # several projections of one x: their dx is a sum
        weight = weight * len([name for name in results if name.startswith("y")])
    without = {"y": x @ problem.weight.double().T, "dx": problem.dy.double() @ weight}
    first = "y" if "y" in results else "y0"
    return tuple(
        _gain(results[name].double(), without[key], (expected.exact[name] - without[key]) * small.ratio / problem.ratio)
        for key, name in (("y", first), ("dx", "dx"))
    )


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`, in float64."""
    difference = (actual.double() - exact.double()).norm().item()
    return difference / max(exact.double().norm().item(), 1e-300)


def _gain(actual: Tensor, without: Tensor, update: Tensor) -> float:
    return ((actual - without) * update).sum().item() / update.square().sum().item()


def _evaluate(workload: Workload, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in workload.leaves.items()}
    outputs = workload.formula(leaves)
    grads = torch.autograd.grad(outputs, list(leaves.values()), [grad.to(dtype) for grad in workload.grads])
    return named(outputs, grads, leaves)
