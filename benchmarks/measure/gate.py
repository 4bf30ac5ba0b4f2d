"""The gate before every timing: outputs and all gradients against float64.

A provider may be off by at most twice what plain PyTorch is off by at that dtype, for each tensor by itself.
"""

import dataclasses

import torch
from torch import Tensor

from benchmarks.measure.workload import Workload, named


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
    """The results of a formula in float64, and how far plain PyTorch is off at the case's dtype."""

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


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`, in float64."""
    difference = (actual.double() - exact.double()).norm().item()
    return difference / max(exact.double().norm().item(), 1e-300)


def _evaluate(workload: Workload, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in workload.leaves.items()}
    outputs = workload.formula(leaves)
    grads = torch.autograd.grad(outputs, list(leaves.values()), [grad.to(dtype) for grad in workload.grads])
    return named(outputs, grads, leaves)
