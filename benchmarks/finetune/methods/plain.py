"""The methods that need no adapter: train the biases, or the head alone."""

from torch import nn

from ..tasks.problem import Problem
from .method import Method, Unsuitable


def bitfit(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """Every bias and the head train."""
    if not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise Unsuitable("the model has no biases")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    return _with_head(model, problem)


def linear_probe(model: nn.Module, problem: Problem, size: int, scale: float) -> nn.Module:
    """Only the head trains."""
    return _with_head(model.requires_grad_(False), problem)


def _with_head(model: nn.Module, problem: Problem) -> nn.Module:
    if problem.places.head:
        model.get_submodule(problem.places.head).requires_grad_(True)
    return model


BITFIT = Method("BitFit", bitfit, rates=tuple(5e-4 * 2**step for step in range(6)), scales=(1.0,), sized=False)
PROBE = Method(
    "linear probe", linear_probe, rates=tuple(5e-4 * 2**step for step in range(12)), scales=(1.0,), sized=False,
    needs_head=True,
)  # fmt: skip
